//! Every command of README.md and of the pages under `docs/` is run as it stands.

mod emulated;
mod lines;
mod site;

use std::path::{Path, PathBuf};

use site::Site;

use crate::machines::Machines;

/// The broker's machine and two that compute.
const MACHINES: usize = 3;

fn pages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    paths.push(root.join("README.md"));
    paths.sort();
    let name = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The cluster file that `docs/planning.md` shows.
fn cluster_file(pages: &[(String, String)]) -> String {
    let (_, planning) = pages.iter().find(|(name, _)| name == "docs/planning.md").unwrap();
    let mut blocks = planning.split("```toml\n").skip(1).filter_map(|block| block.split("```").next());
    blocks.find(|block| block.contains("[[device]]")).unwrap().to_owned()
}

#[test]
fn the_commands_of_the_pages_run() {
    let pages = pages();
    let machines = Machines::new(MACHINES).map_err(|reason| {
        eprintln!("no machines of their own for broker and CompNodes, so all run here, on free ports: {reason}");
    });
    let mut site = Site::new(machines.ok(), &cluster_file(&pages));
    let mut count = 0;
    for (name, page) in &pages {
        for command in lines::commands(page) {
            let began = std::time::Instant::now();
            let failed = |reason| panic!("{name}:{}: `{}`: {reason}", command.line, command.text);
            site.run(&command.text).unwrap_or_else(failed);
            eprintln!("{:6.2} s  {name}:{}: {}", began.elapsed().as_secs_f64(), command.line, command.text);
            count += 1;
        }
    }
    for part in site::LEFT_OUT {
        let is_there = |page: &str| lines::commands(page).iter().any(|command| command.text.contains(part));
        assert!(pages.iter().any(|(_, page)| is_there(page)), "no page has `{part}` any more");
    }
    assert!(count >= 30, "{count} commands found");
}
