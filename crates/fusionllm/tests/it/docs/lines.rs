//! The commands that a page shows.

/// A command as a page has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// Its first line, counted from 1.
    pub(super) line: usize,
    /// The command, without the `$`, comment and line breaks.
    pub(super) text: String,
}

/// Every `fusionllm` command of a page: in blocks of code, and in running text where it has arguments.
pub(super) fn commands(page: &str) -> Vec<Shown> {
    let mut shown = Vec::new();
    let mut fence: Option<&str> = None;
    let mut lines = page.lines().zip(1..).peekable();
    let mut paragraph = (1, String::new());
    while let Some((line, number)) = lines.next() {
        let trimmed = line.trim();
        if let Some(language) = trimmed.strip_prefix("```") {
            fence = if fence.is_some() { None } else { Some(language) };
            continue;
        }
        let is_code = fence.is_some_and(|l| matches!(l, "" | "sh" | "bash" | "shell" | "console"))
            || (fence.is_none() && line.starts_with("    "));
        if is_code && is_command(trimmed) {
            let mut text = trimmed.to_owned();
            while let Some(part) = text.strip_suffix('\\') {
                let next = lines.next().map_or("", |(next, _)| next.trim());
                text = format!("{part}{next}");
            }
            shown.push(Shown { line: number, text: bare(&text) });
        }
        if fence.is_none() && !is_code && !trimmed.is_empty() {
            paragraph.1.push_str(trimmed);
            paragraph.1.push(' ');
        }
        let ends = lines.peek().is_none_or(|(next, _)| next.trim().is_empty() || next.trim().starts_with("```"));
        if ends {
            let (first, text) = std::mem::replace(&mut paragraph, (number + 1, String::new()));
            let spans = text.split('`').skip(1).step_by(2);
            let runs = spans.filter(|span| span.starts_with("fusionllm ") && span.split_whitespace().count() > 2);
            shown.extend(runs.map(|text| Shown { line: first, text: bare(text) }));
        }
    }
    shown
}

fn is_command(line: &str) -> bool {
    line.starts_with("cargo run --release -- ") || line.split_whitespace().any(|word| word == "fusionllm")
}

/// Without prompt and comment; parts that may be left out are there; `cargo run` is the binary that it builds.
fn bare(text: &str) -> String {
    let text = text.split(" #").next().unwrap_or_default().trim().trim_start_matches("$ ");
    text.replace("cargo run --release -- ", "fusionllm ").replace("[--", "--").replace(']', "")
}

#[test]
fn commands_are_found_wherever_they_stand() {
    let page = "Say `fusionllm plan` or `fusionllm plan A\n--graph` and `cargo`.\n\n    fusionllm train A \\\n        --set b=1 [--c d] # not this\n    \
                cargo build\n\n```sh\ncargo run --release -- train B\nX=1 fusionllm status | cat\n```\n\n```toml\nfusionllm no\n```\n";
    let found: Vec<(usize, String)> = commands(page).into_iter().map(|c| (c.line, c.text)).collect();
    let expected = [
        (1, "fusionllm plan A --graph"),
        (4, "fusionllm train A --set b=1 --c d"),
        (9, "fusionllm train B"),
        (10, "X=1 fusionllm status | cat"),
    ];
    assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
}
