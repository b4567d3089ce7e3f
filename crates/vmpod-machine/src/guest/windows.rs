//! Command lines for Windows guests, whose SSH server gives them to `cmd.exe /c`.

use super::{Exec, GuestError};

/// What `cmd.exe` takes; a longer line is cut (<https://learn.microsoft.com/troubleshoot/windows-client/shell-experience/command-line-string-limitation>).
const LONGEST: usize = 8191;

/// A command as a line, its directory and environment before it.
pub(super) fn line(exec: &Exec) -> Result<String, GuestError> {
    let mut line = String::new();
    for (name, value) in &exec.env {
        if name.is_empty() || name.contains(['=', '"', '%', '^', '&', '|', '<', '>']) {
            return Err(GuestError::Invalid(format!(
                "\"{name}\" can't name an environment variable in a Windows guest"
            )));
        }
        line.extend(["set ", &escaped(name), "=", &escaped(value), "&"]);
    }
    if let Some(workdir) = &exec.workdir {
        line.extend(["cd /d ", &escaped(&quoted(workdir)), "&&"]);
    }
    let words: Vec<_> = exec.command.iter().map(|word| escaped(&quoted(word))).collect();
    line.push_str(&words.join(" "));
    if line.contains(['\n', '\r']) {
        return Err(GuestError::Invalid(
            "a command for a Windows guest, its directory and its environment have no line breaks".to_owned(),
        ));
    }
    if line.encode_utf16().count() > LONGEST {
        return Err(GuestError::Invalid(format!(
            "a command for a Windows guest has at most {LONGEST} characters, its environment among them"
        )));
    }
    Ok(line)
}

/// One argument, as programs take their line apart
/// (<https://learn.microsoft.com/cpp/c-language/parsing-c-command-line-arguments>).
fn quoted(word: &str) -> String {
    let whole = word.is_empty() || word.contains([' ', '\t']);
    let mut text = String::new();
    let mut backslashes = 0;
    for c in word.chars() {
        match c {
            '\\' => {
                backslashes += 1;
                continue;
            }
            // Those before a quote count twice, and one more takes its meaning away.
            '"' => text.push_str(&"\\".repeat(backslashes * 2 + 1)),
            _ => text.push_str(&"\\".repeat(backslashes)),
        }
        backslashes = 0;
        text.push(c);
    }
    text.push_str(&"\\".repeat(if whole { backslashes * 2 } else { backslashes }));
    if whole { format!("\"{text}\"") } else { text }
}

/// Takes the meaning of what `cmd.exe` itself would read, quotes among it: they would end where a program sees none.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if "()%!^\"<>&|".contains(c) {
            out.push('^');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// What `cmd.exe` makes of a line without quotes of its own: a caret takes the meaning of what follows.
    fn read_by_cmd(line: &str) -> String {
        let mut chars = line.chars();
        let mut out = String::new();
        while let Some(c) = chars.next() {
            match c {
                '^' => out.extend(chars.next()),
                '(' | ')' | '%' | '!' | '"' | '<' | '>' | '&' | '|' => panic!("{c:?} has its meaning in {line:?}"),
                c => out.push(c),
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Python has the rules of Microsoft's C library as well.
        #[test]
        fn arguments_are_those_of_an_independent_encoder(words in proptest::collection::vec("[ -~ü]{0,12}", 1..5)) {
            let program = "import subprocess, sys; sys.stdout.write(subprocess.list2cmdline(sys.argv[1:]))";
            let output = Command::new("python3").args(["-c", program]).args(&words).output().unwrap();
            let wanted = String::from_utf8(output.stdout).unwrap();
            let line = line(&Exec::new(words)).unwrap();
            prop_assert_eq!(read_by_cmd(&line), wanted);
        }
    }

    #[test]
    fn directory_and_environment_come_first() {
        let exec = Exec {
            env: vec![("A".to_owned(), "100% & \"more\"".to_owned())],
            workdir: Some("C:\\Program Files".to_owned()),
            ..Exec::new(["echo", "%A%"])
        };
        assert_eq!(line(&exec).unwrap(), "set A=100^% ^& ^\"more^\"&cd /d ^\"C:\\Program Files^\"&&echo ^%A^%");
    }

    #[test]
    fn what_no_line_can_hold_is_refused() {
        let of = |words: &[&str], env: &[(&str, &str)]| {
            let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            line(&Exec { env, ..Exec::new(words.iter().copied()) }).unwrap_err().to_string()
        };
        assert!(of(&["a\nb"], &[]).contains("no line breaks"));
        assert!(of(&["a"], &[("A=B", "")]).contains("can't name"));
        assert!(of(&[&"x".repeat(9000)], &[]).contains("at most 8191 characters"));
    }
}
