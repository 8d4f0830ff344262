//! What others do to a run's folders while its last checkpoint is written: all that the run has made is in memory then, and
//! is not given up.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::process::{Bench, LIMIT, Running, losses, text};

const STEPS: u64 = 2;

/// A run whose only checkpoint is the last one, and large enough to be caught while it is written.
fn start(bench: &Bench, keys: &str) -> Running {
    bench.start(&format!(
        "train job.toml --out run --json --set train.steps={STEPS} --set train.eval_every=0 --set checkpoint.every=0 \
         --set model.n_layer=4 --set model.n_embd=256 --set compression.policy=\"dense\" {keys}"
    ))
}

fn is_partial(name: &str) -> bool {
    name.contains(".partial-") && !name.contains(".removed")
}

fn partial_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries.map(|entry| entry.path()).find(|path| is_partial(&path.file_name().unwrap().to_string_lossy()))
}

/// Does something at the moment at which shards lie in `folder`; a run that was faster is begun anew.
fn caught(folder: &str, keys: &str, meddle: impl Fn(&Bench)) -> (Bench, Running) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let bench = Bench::new();
        let run = start(&bench, keys);
        let place = bench.path(folder);
        while partial_in(&place).is_none() {
            assert!(Instant::now() < deadline, "no shards came");
            std::thread::yield_now();
        }
        run.signal("STOP");
        if partial_in(&place).is_some() {
            meddle(&bench);
            run.signal("CONT");
            return (bench, run);
        }
        run.signal("CONT");
    }
}

/// The run ends well, and its last checkpoint is in `place`.
fn is_kept(bench: &Bench, run: Running, place: impl Fn(&Bench) -> PathBuf) -> String {
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert!(out.contains("the last checkpoint could not be written"), "{out}");
    let checkpoint = place(bench).join(format!("step-{STEPS}"));
    assert!(checkpoint.join("manifest.json").is_file(), "{out}\n{err}");
    assert_eq!(losses(&bench.path("run")).len() as u64, STEPS);
    let files = std::fs::read_dir(bench.path("run")).unwrap().flatten();
    let others: Vec<_> =
        files.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains(".other")).collect();
    assert!(others.is_empty(), "{others:?}");
    bench.succeed("export run hf");
    let more = bench.run(&format!("train --resume run --set train.steps={}", STEPS + 1));
    assert_eq!(more.status.code(), Some(0), "{}", text(&more.stderr));
    out
}

fn spare(bench: &Bench) -> PathBuf {
    let entries = std::fs::read_dir(bench.path("run")).unwrap().flatten();
    let is_spare = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("checkpoints-");
    entries.map(|entry| entry.path()).find(is_spare).unwrap()
}

fn rename(bench: &Bench, from: &str) {
    std::fs::rename(bench.path(from), bench.path("moved")).unwrap();
}

#[test]
fn a_run_directory_that_is_renamed_is_made_again() {
    for compnodes in [1, 2] {
        let (bench, run) = caught("run/checkpoints", &format!("--compnodes {compnodes}"), |bench| rename(bench, "run"));
        let out = is_kept(&bench, run, |bench| bench.path("run/checkpoints"));
        assert!(out.contains("run is not there any more") && out.contains("/moved"), "{out}");
    }
}

#[test]
fn a_folder_for_checkpoints_that_is_renamed_or_emptied_is_made_again() {
    for emptied in [false, true] {
        let (bench, run) = caught("run/checkpoints", "--compnodes 1", |bench| match emptied {
            true => std::fs::remove_dir_all(partial_in(&bench.path("run/checkpoints")).unwrap()).unwrap(),
            false => rename(bench, "run/checkpoints"),
        });
        is_kept(&bench, run, |bench| bench.path("run/checkpoints"));
    }
}

#[test]
fn where_something_else_is_in_the_place_of_the_folder_the_checkpoint_goes_beside_it() {
    let (bench, run) = caught("run/checkpoints", "--compnodes 1", |bench| {
        rename(bench, "run/checkpoints");
        std::fs::create_dir(bench.path("run/checkpoints")).unwrap();
        bench.write(&format!("run/checkpoints/step-{STEPS}"), "theirs");
    });
    is_kept(&bench, run, spare);
    assert_eq!(std::fs::read_to_string(bench.path(&format!("run/checkpoints/step-{STEPS}"))).unwrap(), "theirs");
}

#[test]
fn a_folder_elsewhere_that_is_renamed_is_made_again_and_what_comes_in_its_place_is_left() {
    let (bench, run) = caught("ck", "--compnodes 1 --set checkpoint.to=ck", |bench| rename(bench, "ck"));
    is_kept(&bench, run, |bench| bench.path("ck"));
    let (bench, run) = caught("ck", "--compnodes 1 --set checkpoint.to=ck", |bench| {
        rename(bench, "ck");
        std::fs::create_dir(bench.path("ck")).unwrap();
        bench.write("ck/theirs", "theirs");
    });
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert!(out.contains("ck/theirs is in the way") && out.contains("the last checkpoint goes to"), "{out}");
    assert!(spare(&bench).join(format!("step-{STEPS}/manifest.json")).is_file(), "{out}");
    assert_eq!(std::fs::read_dir(bench.path("ck")).unwrap().count(), 1);
    bench.succeed("export run hf");
}

/// The run directory is where it was, whatever is in its place.
#[test]
fn where_something_else_is_in_the_place_of_the_run_directory_the_run_follows_it() {
    let (bench, run) = caught("run/checkpoints", "--compnodes 1", |bench| {
        rename(bench, "run");
        std::fs::create_dir(bench.path("run")).unwrap();
        bench.write("run/theirs", "theirs");
    });
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert!(bench.path(&format!("moved/checkpoints/step-{STEPS}/manifest.json")).is_file(), "{out}\n{err}");
    assert!(out.contains("moved"), "{out}");
    assert_eq!(losses(&bench.path("moved")).len() as u64, STEPS);
    assert!(bench.path("moved/report.md").is_file());
    assert_eq!(std::fs::read_dir(bench.path("run")).unwrap().count(), 1);
    bench.succeed("export moved hf");
}

/// What to go on from is looked up: a run that goes on reads its checkpoint while it begins.
#[test]
fn the_way_on_of_a_run_that_cannot_begin_is_true() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out run --compnodes 1 --set train.steps=8 --set checkpoint.every=4");
    let mut run = bench.start("train --resume run --compnodes 1 --set train.steps=12");
    run.wait_for("going on in");
    std::fs::rename(bench.path("run/checkpoints"), bench.path("moved")).unwrap();
    let (code, out, err) = run.finish();
    let last = bench.path("run/checkpoints/step-12/manifest.json");
    assert_eq!(last.is_file(), code == Some(0), "{code:?}: {out}\n{err}");
    if code == Some(0) {
        // It had read them by then, and done its steps.
        return;
    }
    let names_it = ["the checkpoint of step 8 is not", "no such file", "No such file"];
    assert!(names_it.iter().any(|what| err.contains(what)), "{out}\n{err}");
    assert!(!err.contains("goes on from the checkpoint"), "{out}\n{err}");
}
