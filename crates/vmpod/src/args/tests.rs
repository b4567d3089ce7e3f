use clap::{CommandFactory, Parser};

use super::*;

/// Every command's long help, as a person reads it.
fn helps() -> Vec<(String, String)> {
    fn walk(command: &mut clap::Command, path: &str, all: &mut Vec<(String, String)>) {
        let name =
            if path.is_empty() { command.get_name().to_owned() } else { format!("{path} {}", command.get_name()) };
        all.push((name.clone(), command.render_long_help().to_string()));
        for sub in command.get_subcommands_mut() {
            walk(sub, &name, all);
        }
    }
    let mut root = Cli::command().term_width(100);
    root.build();
    let mut all = Vec::new();
    walk(&mut root, "", &mut all);
    all
}

#[test]
fn the_help_is_what_it_was() {
    let all: Vec<String> =
        helps().into_iter().map(|(name, help)| format!("══ {name}\n{}\n", help.trim_end())).collect();
    let all = all.concat();
    insta::assert_snapshot!("help", all);
}

#[test]
fn the_definition_holds() {
    Cli::command().debug_assert();
}

fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"vmpod").chain(words))
}

#[test]
fn a_command_is_after_two_dashes() {
    let Command::Run(run) = parse(&["run", "tiny", "-m", "1Gi", "--", "sh", "-c", "exit 3"]).unwrap().command else {
        panic!("not a run");
    };
    assert_eq!(run.command, ["sh", "-c", "exit 3"]);
    assert_eq!(run.memory.unwrap().quantity, "1Gi");
    assert!(parse(&["exec", "pod"]).is_err(), "exec without a command was taken");
    assert!(parse(&["run", "tiny", "true"]).is_err(), "a command without -- was taken");
}

#[test]
fn the_home_may_stand_anywhere() {
    for words in [["--home", "/h", "ps"], ["ps", "--home", "/h"]] {
        assert_eq!(parse(&words).unwrap().global.home.unwrap(), PathBuf::from("/h"));
    }
    let cli = parse(&["image", "ls", "--home", "/h"]).unwrap();
    assert_eq!(cli.global.home.unwrap(), PathBuf::from("/h"));
}

#[test]
fn an_import_has_a_path_or_a_kernel() {
    let Command::Image(Image { command: ImageCommand::Import(import) }) =
        parse(&["image", "import", "disk.raw", "tiny", "--firmware", "uefi"]).unwrap().command
    else {
        panic!("not an import");
    };
    assert_eq!(import.path_and_name, ["disk.raw", "tiny"]);
    assert_eq!(import.boot.firmware, Some(Firmware::Uefi));
    assert!(parse(&["image", "import", "x", "--initrd", "i"]).is_err(), "an initrd without a kernel was taken");
}

#[test]
fn wrong_usage_is_exit_code_two() {
    for words in [&["nonsense"][..], &["run"], &["up", "--api-port", "70000"], &["run", "a", "--memory", "1x"]] {
        assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
    }
}
