//! The house rules that a machine can hold.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines beyond which a file holds a second idea.
const MOST_LINES: usize = 450;

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub(crate) fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// `fusionllm-planner` in the table of ARCHITECTURE.md: the crate and those of ours that it may use.
fn allowed() -> Vec<(String, BTreeSet<String>)> {
    let text = read(&root().join("ARCHITECTURE.md"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let uses = cells.get(2)?;
        if !name.starts_with("fusionllm") {
            return None;
        }
        let uses = uses.split(',').map(|u| u.trim().trim_matches('`')).filter(|u| !u.is_empty() && *u != "-");
        Some((name.to_owned(), uses.map(|u| format!("fusionllm-{u}")).collect()))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn the_crates_use_each_other_as_the_architecture_says() {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let mut real: Vec<(String, BTreeSet<String>)> = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let uses = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
        let ours = uses.map(|d| d["name"].as_str().unwrap().to_owned()).filter(|n| n.starts_with("fusionllm"));
        real.push((package["name"].as_str().unwrap().to_owned(), ours.collect()));
    }
    real.sort();
    let mut allowed = allowed();
    allowed.sort();
    assert_eq!(real, allowed);
}

#[test]
fn every_file_says_what_it_is_and_holds_one_idea() {
    let mut files = Vec::new();
    rust_files(&root().join("crates"), &mut files);
    rust_files(&root().join("tools/wan-emu/src"), &mut files);
    assert!(files.len() > 100);
    for file in files {
        let text = read(&file);
        assert!(text.starts_with("//! "), "{} does not begin with what it is", file.display());
        // Tables of cases and tests may be long; code may not.
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let lines = code.lines().count();
        let is_test = file.components().any(|part| ["tests", "tests.rs"].iter().any(|name| part.as_os_str() == *name));
        assert!(is_test || lines <= MOST_LINES, "{} has {lines} lines of code", file.display());
    }
}

#[test]
fn only_one_folder_knows_burn() {
    let mut files = Vec::new();
    rust_files(&root().join("crates"), &mut files);
    let burn = root().join("crates/fusionllm-compnode/src/burn");
    let outside = |file: &&PathBuf| !file.starts_with(&burn) && **file != burn.with_extension("rs");
    for file in files.iter().filter(outside) {
        for name in ["burn_tensor", "burn_autodiff", "burn_flex", "BurnExecutor"] {
            // This file has to spell them.
            let is_here = file.ends_with("tests/it/tidy.rs");
            assert!(is_here || !read(file).contains(name), "{} names {name}", file.display());
        }
    }
}

/// The number that a constant has in a source file.
fn constant(file: &str, name: &str) -> String {
    let text = read(&root().join("crates").join(file));
    let line = text.lines().find(|line| line.contains(&format!("const {name}: "))).unwrap_or_else(|| panic!("{name}"));
    line.split(" = ").nth(1).unwrap().trim_end_matches(';').trim_start_matches('b').trim_matches('"').to_owned()
}

#[test]
fn the_page_of_versions_has_those_of_the_code() {
    let page = read(&root().join("docs/versions.md"));
    let cell = |row: &str| {
        let line = page.lines().find(|line| line.starts_with(&format!("| {row}"))).unwrap_or_else(|| panic!("{row}"));
        line.split('|').nth(2).unwrap().replace('`', "").trim().to_owned()
    };
    let codec = |name: &str| constant(&format!("fusionllm-codec/src/codecs/{name}.rs"), "VERSION");
    let alpn = |name: &str| constant("fusionllm-transport/src/quic/settings.rs", name);
    let expected = [
        ("protocol", constant("fusionllm-protocol/src/version.rs", "PROTOCOL_VERSION")),
        ("ALPN", format!("{}, {}", alpn("ALPN"), alpn("PROBE_ALPN"))),
        ("ticket", constant("fusionllm-transport/src/ticket.rs", "FORM")),
        ("store", constant("fusionllm-broker/src/store.rs", "SCHEMA_VERSION")),
        ("checkpoint manifest", constant("fusionllm-protocol/src/manifest.rs", "VERSION")),
        ("graph JSON", constant("fusionllm-graph/src/json.rs", "JSON_VERSION")),
        ("codec payloads", [codec("transform"), codec("topk"), codec("quantize")].join(", ")),
    ];
    for (row, version) in expected {
        assert_eq!(cell(row), version, "{row}");
    }
}

#[test]
fn the_job_page_has_every_key() {
    let page = read(&root().join("docs/job.md"));
    for (section, key) in fusionllm::protocol::job_keys() {
        let full = if section.is_empty() { (*key).to_owned() } else { format!("{section}.{key}") };
        assert!(page.contains(&format!("| `{full}` |")), "docs/job.md lacks a row for `{full}`");
    }
}

/// A job with each documented default written out is the job that leaves it out.
#[test]
fn the_job_page_has_the_defaults() {
    let page = read(&root().join("docs/job.md"));
    let job = |given: &[String]| {
        let least = "[model]\nname = \"gpt2\"\n[data]\npath = \"text\"\n";
        fusionllm::protocol::JobSpec::from_toml(least, given).unwrap_or_else(|e| panic!("{given:?}: {e}"))
    };
    let mut count = 0;
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (key, default) = (cells[1].trim_matches('`'), cells[2]);
        let Some(default) = default.strip_prefix('`').and_then(|d| d.strip_suffix('`')) else { continue };
        // The value of another key.
        if page.contains(&format!("| `{default}` |")) && default.contains('.') && !default.starts_with(char::is_numeric)
        {
            continue;
        }
        assert_eq!(job(&[format!("{key}={default}")]), job(&[]), "docs/job.md: `{key}` is not {default} by default");
        count += 1;
    }
    assert!(count > 30, "{count} defaults found");
}

/// Links, and files that are named by a path with a folder in it.
#[test]
fn the_pages_name_files_that_exist() {
    let mut pages: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "tools/wan-emu/README.md", "benches/peers/README.md"]
            .map(|page| root().join(page))
            .to_vec();
    pages.extend(std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut sources = Vec::new();
    rust_files(&root().join("crates"), &mut sources);
    for page in pages {
        let (text, folder) = (read(&page), page.parent().unwrap());
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let path = link.split('#').next().unwrap();
            assert!(folder.join(path).exists(), "{}: the link to {link} leads nowhere", page.display());
        }
        let is_file = |span: &&str| {
            let kinds = [".rs", ".py", ".md", ".toml", ".json"];
            let is_path = span.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "/_-.".contains(c));
            span.contains('/') && is_path && kinds.iter().any(|kind| span.ends_with(kind))
        };
        for file in text.split('`').skip(1).step_by(2).filter(is_file) {
            let is_there = root().join(file).exists() || folder.join(file).exists();
            let is_in_a_crate = || sources.iter().any(|source| source.to_string_lossy().ends_with(file));
            assert!(is_there || is_in_a_crate(), "{}: there is no {file}", page.display());
        }
    }
}

/// `cargo … -p CRATE --bench NAME` and the like name what there is.
#[test]
fn the_cargo_commands_of_the_pages_name_targets() {
    let manifest = |name: &str| read(&root().join("crates").join(name).join("Cargo.toml"));
    let mut pages: Vec<PathBuf> = vec![root().join("README.md")];
    pages.extend(std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut count = 0;
    for line in pages.iter().flat_map(|page| read(page).split(['\n', '`']).map(str::to_owned).collect::<Vec<_>>()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1).copied();
        if words.first() != Some(&"cargo") || words.get(1).is_none_or(|w| *w == "fuzz") {
            continue;
        }
        let package = after("-p").unwrap_or("fusionllm");
        let (text, folder) = (manifest(package), root().join("crates").join(package));
        for (flag, place) in [("--bench", "benches"), ("--example", "examples")] {
            let Some(name) = after(flag) else { continue };
            assert!(folder.join(place).join(format!("{name}.rs")).is_file(), "`{line}`: {package} has no {name}");
            count += 1;
        }
        if let Some(feature) = after("--features") {
            assert!(text.contains(&format!("\n{feature} = ")), "`{line}`: {package} has no feature {feature}");
            count += 1;
        }
    }
    assert!(count >= 4, "{count} targets found");
}

#[test]
fn the_examples_are_jobs() {
    for entry in std::fs::read_dir(root().join("examples")).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "toml") {
            let spec = fusionllm::protocol::JobSpec::from_toml(&read(&path), &[]);
            let spec = spec.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            spec.validate().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}

#[test]
fn the_commands_of_the_pages_parse() {
    let pages = ["README.md", "docs/operating.md"].map(|page| read(&root().join(page)));
    let mut count = 0;
    for line in pages.iter().flat_map(|page| page.lines()) {
        let line = line.trim().trim_start_matches("cargo run --release -- ");
        let Some(arguments) = line.strip_prefix("fusionllm ").or_else(|| line.strip_prefix("train ")) else { continue };
        let command = arguments.split_whitespace().next().unwrap_or_default();
        let command = if line.starts_with("train ") { "train" } else { command };
        let of_it = arguments.split_whitespace().nth(1).filter(|_| command == "ticket");
        let help =
            Command::new(env!("CARGO_BIN_EXE_fusionllm")).arg(command).args(of_it).arg("--help").output().unwrap();
        assert!(help.status.success(), "`{line}`: there is no such command");
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for flag in arguments.split_whitespace().filter(|w| w.starts_with("--")) {
            assert!(help.contains(flag), "`{line}`: there is no {flag}");
        }
        count += 1;
    }
    assert!(count >= 5, "{count} commands found");
}

#[test]
fn the_readmes_test_command_is_what_ci_runs() {
    let (readme, ci) = (read(&root().join("README.md")), read(&root().join(".ci/run")));
    assert!(
        readme.contains("\ncargo test --release --workspace\n")
            && ci.contains("cargo test --release --locked --workspace")
    );
}
