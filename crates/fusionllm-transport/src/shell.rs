//! Words of commands that people are told to type: a POSIX shell takes them literally.

use std::path::Path;

/// A word of a command.
pub fn shell_word(word: &str) -> String {
    // Only NUL cannot be quoted, and no command line could have given it.
    shlex::try_quote(word).map_or_else(|_| word.replace('\0', ""), std::borrow::Cow::into_owned)
}

/// A path as a word of a command. One that begins like an option is written so that it is none.
pub fn shell_path(path: &Path) -> String {
    let text = path.display().to_string();
    shell_word(&if text.starts_with('-') { format!("./{text}") } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_shell_takes_every_word_as_it_is() {
        for word in
            ["plain", "", "a b", "it's", "\"x\"", "$HOME `id` $(id)", "a\\b", "*?[x]", "~", "#x", "a;b&c|d>e", "é\n"]
        {
            let line = format!("printf '[%s]' {}", shell_word(word));
            let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("[{word}]"), "{line}");
        }
        assert_eq!(shell_path(Path::new("/runs/a-1")), "/runs/a-1");
        assert_eq!(shell_path(Path::new("-rf x")), "'./-rf x'");
    }
}
