//! Quoting for a POSIX shell.

/// One word, whatever is in it.
pub(crate) fn quote(word: &str) -> String {
    let plain =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/' | b':' | b'=' | b'@' | b',' | b'+');
    if !word.is_empty() && word.bytes().all(plain) && !word.contains('=') {
        return word.to_owned();
    }
    // Between single quotes a shell changes nothing; a single quote itself is put between two such pieces.
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Several words with spaces between.
pub(crate) fn join<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    words.into_iter().map(|word| quote(word.as_ref())).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_real_shell_gives_the_words_back(words in proptest::collection::vec("[^\0]{0,20}", 1..5)) {
            let script = format!("printf '%s\\001' {}", join(&words));
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let back: Vec<_> = text.split_terminator('\u{1}').map(ToOwned::to_owned).collect();
            prop_assume!(!words.iter().any(|word| word.contains('\u{1}')));
            prop_assert_eq!(back, words);
        }
    }

    #[test]
    fn plain_words_stay_plain() {
        assert_eq!(join(["ls", "-l", "/tmp/a.b"]), "ls -l /tmp/a.b");
        assert_eq!(join(["a b", "", "it's", "A=1"]), "'a b' '' 'it'\\''s' 'A=1'");
    }
}
