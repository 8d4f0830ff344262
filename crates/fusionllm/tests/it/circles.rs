//! Within a crate, modules use each other in one direction, as ARCHITECTURE.md says.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::path::Path;
use std::str::Chars;

use crate::tidy::{read, root, rust_files};

/// A module by the names from the crate's root, which is empty.
type Module = Vec<String>;

/// Code without comments and the contents of strings and of characters.
fn bare(text: &str) -> String {
    let (mut code, mut chars) = (String::new(), text.chars().peekable());
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('/', Some('/')) => skip_line(&mut chars),
            ('"', _) => skip_string(&mut chars),
            ('r', Some('"' | '#')) if !code.ends_with(is_of_name) => skip_raw_string(&mut chars),
            ('\'', _) => skip_character(&mut chars),
            _ => code.push(c),
        }
    }
    code
}

fn is_of_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn skip_line(chars: &mut Peekable<Chars<'_>>) {
    while chars.next_if(|c| *c != '\n').is_some() {}
}

fn skip_string(chars: &mut Peekable<Chars<'_>>) {
    while let Some(c) = chars.next() {
        match c {
            '\\' => _ = chars.next(),
            '"' => break,
            _ => {}
        }
    }
}

/// After the `r`. A raw name such as `r#type` becomes nothing.
fn skip_raw_string(chars: &mut Peekable<Chars<'_>>) {
    let mut hashes = 0;
    while chars.next_if_eq(&'#').is_some() {
        hashes += 1;
    }
    if chars.next_if_eq(&'"').is_none() {
        return;
    }
    while let Some(c) = chars.next() {
        if c == '"' && (0..hashes).all(|_| chars.next_if_eq(&'#').is_some()) {
            break;
        }
    }
}

/// After the quote, of a character or of a lifetime.
fn skip_character(chars: &mut Peekable<Chars<'_>>) {
    let Some(first) = chars.next() else { return };
    if first == '\\' {
        _ = chars.next();
        while chars.next_if(|c| *c != '\'').is_some() {}
    }
    _ = chars.next_if_eq(&'\'');
}

/// Code without what is there for tests alone, and the names of the modules among that.
fn without_tests(code: &str) -> (String, BTreeSet<String>) {
    let (mut rest, mut kept, mut modules) = (code, String::new(), BTreeSet::new());
    while let Some(at) = rest.find("#[cfg(test)]").or_else(|| rest.find("#[cfg(all(test")) {
        kept.push_str(&rest[..at]);
        let item = &rest[at..][rest[at..].find(")]").map_or(0, |end| end + 2)..];
        let (item, after) = item.split_at(end_of_item(item));
        let name = item.trim().trim_end_matches(';').rsplit_once("mod ").map(|(_, name)| name.trim().to_owned());
        modules.extend(name.filter(|name| name.chars().all(is_of_name)));
        rest = after;
    }
    kept.push_str(rest);
    (kept, modules)
}

/// Where an item, or a field, ends that the text begins with.
fn end_of_item(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' if depth == 0 => return at,
            '}' if depth == 1 => return at + 1,
            '}' | ')' | ']' => depth -= 1,
            ';' | ',' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The paths of a `use`, such as `a::b` and `a::c` of `a::{b, c as d}`.
fn paths_of_use(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        return vec![tree.split(" as ").next().unwrap_or_default().trim().to_owned()];
    };
    let inside = &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())];
    let (mut paths, mut depth, mut from) = (Vec::new(), 0, 0);
    for (i, c) in inside.char_indices().chain([(inside.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let parts = paths_of_use(&inside[from..i]).into_iter().filter(|part| !part.is_empty());
                paths.extend(parts.map(|part| format!("{}{part}", &tree[..open])));
                from = i + 1;
            }
            _ => {}
        }
    }
    paths
}

/// All that a file names of its crate, as paths from where it stands.
fn paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("use ").filter(|(at, _)| !code[..*at].ends_with(is_of_name)) {
        paths.extend(paths_of_use(code[at + 4..].split(';').next().unwrap_or_default()));
    }
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start).filter(|(at, _)| !code[..*at].ends_with(|c| is_of_name(c) || c == ':'))
        {
            let end = code[at..].find(|c| !is_of_name(c) && c != ':').unwrap_or(code.len() - at);
            paths.push(code[at..at + end].to_owned());
        }
    }
    paths
}

/// The modules of a crate, and which of the others each uses.
struct Crate {
    code: BTreeMap<Module, String>,
    /// What each brings into its own names.
    names: BTreeMap<Module, BTreeMap<String, String>>,
}

impl Crate {
    fn read(source: &Path) -> Self {
        let (mut code, mut tests, mut files) = (BTreeMap::<Module, String>::new(), BTreeSet::new(), Vec::new());
        rust_files(source, &mut files);
        for file in files {
            let inside = file.strip_prefix(source).unwrap().with_extension("");
            let mut module: Module = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            module.retain(|name| name != "lib" && name != "main");
            let (text, for_tests) = without_tests(&bare(&read(&file)));
            tests.extend(for_tests.into_iter().map(|name| [module.clone(), vec![name]].concat()));
            code.entry(module).or_default().push_str(&text);
        }
        code.retain(|module, _| !tests.iter().any(|test| module.starts_with(test)));
        let used = |text: &String| paths(text).into_iter().map(|path| (last(&path).to_owned(), path)).collect();
        let names = code.iter().map(|(module, text)| (module.clone(), used(text))).collect();
        Self { code, names }
    }

    /// The module in which `from` finds what it calls `path`; nothing if that is not of this crate.
    fn module_of(&self, from: &Module, path: &str, depth: usize) -> Option<Module> {
        let mut parts = path.split("::").map(str::trim).filter(|part| !part.is_empty()).peekable();
        let mut module = match *parts.peek()? {
            "crate" => Vec::new(),
            "self" | "super" => from.clone(),
            name if self.code.contains_key(&[from.clone(), vec![name.to_owned()]].concat()) => from.clone(),
            _ => return None,
        };
        while let Some(part) = parts.peek().copied() {
            let child = [module.clone(), vec![part.to_owned()]].concat();
            match part {
                "crate" | "self" => {}
                "super" => _ = module.pop(),
                _ if self.code.contains_key(&child) => module = child,
                name => {
                    let named = self.names.get(&module).and_then(|names| names.get(name)).filter(|_| depth < 8);
                    return named.and_then(|path| self.module_of(&module, path, depth + 1)).or(Some(module));
                }
            }
            parts.next();
        }
        Some(module)
    }

    /// Of the modules in a folder, each with its own folder: which uses which, and one line that shows it.
    fn uses_in(&self, folder: &Module) -> BTreeMap<&str, BTreeMap<String, String>> {
        let mut uses: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
        let depth = folder.len();
        for (from, text) in self.code.iter().filter(|(from, _)| from.len() > depth && from.starts_with(folder)) {
            for path in paths(text) {
                let Some(to) = self.module_of(from, &path, 0).filter(|to| to.starts_with(folder)) else { continue };
                if to.get(depth).is_some_and(|to| *to != from[depth]) {
                    let shown = format!("{} names {path}", from.join("::"));
                    uses.entry(&from[depth]).or_default().insert(to[depth].clone(), shown);
                }
            }
        }
        uses
    }
}

fn last(path: &str) -> &str {
    path.rsplit("::").next().unwrap_or_default()
}

/// The way from a module back to itself, if there is one.
fn circle(uses: &BTreeMap<&str, BTreeMap<String, String>>, from: &str) -> Option<Vec<String>> {
    let (mut seen, mut ways) = (BTreeSet::new(), vec![(from, Vec::new())]);
    while let Some((at, way)) = ways.pop() {
        for (to, shown) in uses.get(at).into_iter().flatten() {
            let way = [way.clone(), vec![shown.clone()]].concat();
            if to == from {
                return Some(way);
            }
            if seen.insert(to.as_str()) {
                ways.push((to, way));
            }
        }
    }
    None
}

#[test]
fn modules_use_each_other_in_one_direction() {
    let mut circles = Vec::new();
    let crates = std::fs::read_dir(root().join("crates")).unwrap().flatten().map(|package| package.path());
    for package in crates.chain([root().join("tools/wan-emu")]) {
        let read = Crate::read(&package.join("src"));
        assert!(read.code.len() > 5, "{}", package.display());
        let folders: BTreeSet<Module> = read.code.keys().filter_map(|m| Some(m.split_last()?.1.to_vec())).collect();
        for folder in folders {
            let uses = read.uses_in(&folder);
            for name in uses.keys() {
                let way = circle(&uses, name).map(|way| way.join(", "));
                circles.extend(way.map(|way| format!("{}: {way}", package.display())));
            }
        }
    }
    assert!(circles.is_empty(), "circles:\n{}", circles.join("\n"));
}

#[test]
fn a_circle_is_found_through_what_modules_bring_in() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("lib.rs", "mod a; mod b; mod c;\npub use a::{A as X, Y};\n#[cfg(test)]\nmod only { use crate::b; }");
    write("a.rs", "use crate::b::B; // crate::c\n#[cfg(test)] mod tests { use crate::c; }");
    write("b.rs", "fn f() -> crate::Y { \"crate::c\"; '\"' }");
    write("c.rs", "use super::a; fn f() { super::b::g(); }");
    let read = Crate::read(folder.path());
    let uses = read.uses_in(&Vec::new());
    let found = |from: &str| uses[from].keys().map(String::as_str).collect::<Vec<_>>();
    assert_eq!([found("a"), found("b"), found("c")], [vec!["b"], vec!["a"], vec!["a", "b"]]);
    assert!(circle(&uses, "a").is_some() && circle(&uses, "c").is_none());
}
