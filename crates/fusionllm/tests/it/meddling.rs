//! What others do to a run's folders and files while it trains: told once, put right, and nothing of theirs destroyed.

use std::path::{Path, PathBuf};

use crate::process::{Bench, Running, json_lines, losses, text, wait_until};

const STEPS: u64 = 2000;

/// A small run that is under way.
fn start(bench: &Bench, keys: &str) -> Running {
    let line = format!(
        "train job.toml --out run --compnodes 1 --json --set train.steps={STEPS} --set train.eval_every=0 \
         --set checkpoint.every=500 --set checkpoint.keep=0 {keys}"
    );
    let mut run = bench.start(&line);
    run.wait_for("\"step\":50,");
    // Steps are told as they come, and written by and by.
    let has_lines = || std::fs::metadata(bench.path("run/metrics.jsonl")).is_ok_and(|found| found.len() > 0);
    wait_until(has_lines, "metrics");
    run
}

/// Does something at one moment of a run.
fn meanwhile(run: &Running, meddle: impl FnOnce()) {
    run.signal("STOP");
    meddle();
    run.signal("CONT");
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The folder that took the place of `checkpoints`.
fn spare(bench: &Bench) -> PathBuf {
    let name = names(&bench.path("run")).into_iter().find(|name| name.starts_with("checkpoints-"));
    bench.path("run").join(name.unwrap())
}

/// All but that of a checkpoint whose shards were lost with the folder in which they were gathered.
fn notices(out: &str) -> Vec<&str> {
    let is_notice =
        |line: &&str| line.contains("\"event\":\"notice\"") && !line.contains("there is no checkpoint of step");
    out.lines().filter(is_notice).collect()
}

/// The run ends well, with no more notices.
fn ends_well(run: Running) {
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert_eq!(notices(&out), [""; 0], "one notice is enough");
}

fn every_step_is_there(bench: &Bench) {
    let steps: Vec<u64> =
        json_lines(&bench.path("run/metrics.jsonl")).iter().map(|m| m["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    assert!(report.contains("Every step is in"), "{report}");
}

#[test]
fn a_folder_for_checkpoints_that_is_removed_is_told_and_made_again() {
    for removed in [true, false] {
        let bench = Bench::new();
        let mut run = start(&bench, "");
        meanwhile(&run, || match removed {
            true => std::fs::remove_dir_all(bench.path("run/checkpoints")).unwrap(),
            false => std::fs::rename(bench.path("run/checkpoints"), bench.path("moved")).unwrap(),
        });
        let told = run.wait_for("run/checkpoints is not there any more");
        assert!(told.contains("\"event\":\"notice\"") && told.contains("the folder is made again"), "{told}");
        assert_eq!(told.contains("/moved now"), !removed && cfg!(target_os = "linux"), "{told}");
        ends_well(run);
        assert!(bench.path(&format!("run/checkpoints/step-{STEPS}/manifest.json")).is_file());
        bench.succeed("export run hf");
    }
}

/// Another folder, a file, a link to a folder elsewhere, or another run's checkpoints.
#[test]
fn what_comes_in_the_place_of_the_folder_for_checkpoints_stays_as_it_is() {
    for kind in ["folder", "file", "link", "run"] {
        let bench = Bench::new();
        std::fs::create_dir(bench.path("outside")).unwrap();
        bench.write("outside/theirs", "theirs");
        if kind == "run" {
            bench.succeed("train job.toml --out other --compnodes 1");
        }
        let mut run = start(&bench, "");
        let place = bench.path("run/checkpoints");
        meanwhile(&run, || {
            std::fs::rename(&place, bench.path("moved")).unwrap();
            match kind {
                "folder" => {
                    std::fs::create_dir(&place).unwrap();
                    std::fs::write(place.join("theirs"), "theirs").unwrap();
                }
                "file" => std::fs::write(&place, "theirs").unwrap(),
                "link" => std::os::unix::fs::symlink(bench.path("outside"), &place).unwrap(),
                _ => std::fs::rename(bench.path("other/checkpoints"), &place).unwrap(),
            }
        });
        let before = if kind == "file" { Vec::new() } else { names(&place) };
        let told = run.wait_for("run/checkpoints is not there any more");
        assert!(told.contains("something else is in its place, which stays as it is: checkpoints go to "), "{told}");
        ends_well(run);
        let spare = spare(&bench);
        assert!(spare.join(format!("step-{STEPS}/manifest.json")).is_file(), "{kind}: {:?}", names(&spare));
        match kind {
            "file" => assert_eq!(std::fs::read_to_string(&place).unwrap(), "theirs"),
            _ => assert_eq!(names(&place), before, "{kind}"),
        }
        bench.succeed("export run hf");
        // It goes on where it was.
        bench.succeed(&format!("train --resume run --compnodes 1 --set train.steps={}", STEPS + 1));
        assert!(spare.join(format!("step-{}/manifest.json", STEPS + 1)).is_file(), "{kind}: {:?}", names(&spare));
    }
}

#[test]
fn nothing_is_put_into_what_comes_in_the_place_of_a_folder_elsewhere() {
    let bench = Bench::new();
    let mut run = start(&bench, "--set checkpoint.to=ck");
    meanwhile(&run, || {
        std::fs::rename(bench.path("ck"), bench.path("moved")).unwrap();
        std::fs::create_dir(bench.path("ck")).unwrap();
        bench.write("ck/theirs", "theirs");
    });
    let told = run.wait_for("/ck is not there any more");
    assert!(told.contains("something else is in its place") && told.contains("there is no checkpoint"), "{told}");
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    // But for the last one, without which all would be lost.
    assert!(out.contains("ck/theirs is in the way") && out.contains("the last checkpoint goes to"), "{out}");
    assert!(spare(&bench).join(format!("step-{STEPS}/manifest.json")).is_file());
    assert_eq!(names(&spare(&bench)), [format!("step-{STEPS}")]);
    assert_eq!(names(&bench.path("ck")), ["theirs"]);
    assert_eq!(losses(&bench.path("run")).len() as u64, STEPS);
}

#[test]
fn a_lock_that_is_removed_is_taken_again() {
    let bench = Bench::new();
    let mut run = start(&bench, "--set train.steps=1000000");
    run.wait_for("\"event\":\"checkpoint\"");
    std::fs::remove_file(bench.path("run/fusionllm.lock")).unwrap();
    let told = run.wait_for("fusionllm.lock was removed or replaced");
    assert!(told.contains("it is locked again"), "{told}");
    let output = bench.run("train --resume run --set train.steps=2000000");
    assert!(text(&output.stderr).contains("is in use by run"), "{}", text(&output.stderr));
    run.signal("INT");
    let (_, out, _) = run.finish();
    assert_eq!(notices(&out), [""; 0]);
}

#[test]
fn a_folder_or_a_file_in_the_place_of_the_metrics_is_kept_aside_and_told_once() {
    for is_folder in [true, false] {
        let bench = Bench::new();
        let mut run = start(&bench, "");
        meanwhile(&run, || {
            std::fs::remove_file(bench.path("run/metrics.jsonl")).unwrap();
            match is_folder {
                true => std::fs::create_dir(bench.path("run/metrics.jsonl")).unwrap(),
                false => bench.write("run/metrics.jsonl", "theirs"),
            }
        });
        let told = run.wait_for("metrics.jsonl was renamed, removed or replaced");
        assert!(told.contains("it is written again"), "{told}");
        assert!(told.contains("what came in its place is kept as") && told.contains("metrics.jsonl.other"), "{told}");
        let aside = bench.path("run/metrics.jsonl.other");
        ends_well(run);
        assert!(aside.is_dir() == is_folder, "{:?}", names(&bench.path("run")));
        if !is_folder {
            assert_eq!(std::fs::read_to_string(aside).unwrap(), "theirs");
        }
        every_step_is_there(&bench);
    }
}

#[test]
fn metrics_that_are_cut_are_told_and_counted() {
    let bench = Bench::new();
    let mut run = start(&bench, "");
    std::fs::OpenOptions::new().write(true).open(bench.path("run/metrics.jsonl")).unwrap().set_len(10).unwrap();
    let told = run.wait_for("metrics.jsonl was cut short by somebody else");
    assert!(told.contains("bytes of its lines are lost"), "{told}");
    ends_well(run);
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    assert!(report.contains("was cut short") && report.contains("no figures of"), "{report}");
}

/// Whoever removes the lock of a run at work, and has it go on in another process, has taken it away from the first.
#[test]
fn who_has_lost_the_lock_writes_nothing_more() {
    let bench = Bench::new();
    let mut first = start(&bench, "--set train.steps=1000000");
    first.wait_for("\"event\":\"checkpoint\"");
    let (code, out, err) = {
        first.signal("STOP");
        std::fs::remove_file(bench.path("run/fusionllm.lock")).unwrap();
        let mut second = bench.start("train --resume run --json --set train.steps=2000000 --set checkpoint.keep=0");
        second.wait_for("\"event\":\"step\"");
        first.signal("CONT");
        let ended = first.finish();
        second.signal("INT");
        second.finish();
        ended
    };
    assert_eq!(code, Some(1), "{out}\n{err}");
    assert!(err.contains("is at work there by now: this run writes nothing more there"), "{err}");
    let lines = json_lines(&bench.path("run/metrics.jsonl"));
    let steps: Vec<u64> = lines.iter().map(|m| m["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|two| two[0] < two[1]), "{steps:?}");
    bench.succeed("export run hf");
}

/// All files that are written as a whole, and what may come in their place.
#[test]
fn each_file_of_the_run_directory_is_kept_and_written_again() {
    const FILES: [&str; 5] = ["run.json", "job.json", "graph.json", "placement.json", "data.json"];
    for kind in ["folder", "pipe", "link", "file", "nothing"] {
        let bench = Bench::new();
        let mut run = start(&bench, "--set train.steps=1000000");
        wait_until(|| bench.path("run/trace.json").is_file(), "a trace");
        let files = || FILES.iter().chain(&["trace.json"]);
        meanwhile(&run, || {
            for name in files() {
                let path = bench.path(&format!("run/{name}"));
                std::fs::rename(&path, bench.path(&format!("{name}.moved"))).unwrap();
                match kind {
                    "folder" => std::fs::create_dir(&path).unwrap(),
                    "pipe" => drop(std::process::Command::new("mkfifo").arg(&path).status().unwrap()),
                    "link" => std::os::unix::fs::symlink(bench.path(&format!("{name}.moved")), &path).unwrap(),
                    "file" => std::fs::write(&path, "theirs").unwrap(),
                    _ => {}
                }
            }
        });
        for _ in files() {
            let told = run.wait_for("was renamed, removed, replaced or edited: it is written again");
            assert_eq!(told.contains(".json.other"), kind != "nothing", "{told}");
        }
        run.wait_for("\"event\":\"checkpoint\"");
        run.signal("INT");
        let (code, out, err) = run.finish();
        assert_eq!(code, Some(1), "{out}\n{err}");
        for name in files() {
            let (path, other) = (bench.path(&format!("run/{name}")), bench.path(&format!("run/{name}.other")));
            assert!(path.symlink_metadata().unwrap().is_file() && is_json(&path), "{kind}: {name}");
            assert_eq!(other.symlink_metadata().is_ok(), kind != "nothing", "{kind}: {name}");
        }
        let more = bench.run("train --resume run --set train.steps=600");
        let err = text(&more.stderr);
        assert!(more.status.code() == Some(0) || err.contains("are done; raise it"), "{kind}: {err}");
        bench.succeed("export run hf");
    }
}

fn is_json(path: &Path) -> bool {
    serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).unwrap()).is_ok()
}

/// What was put there while nobody was at work.
#[test]
fn what_is_no_file_is_put_aside_when_a_run_goes_on() {
    let bench = Bench::new();
    bench.succeed("train job.toml --out run --compnodes 1");
    for name in ["job.json", "graph.json", "placement.json", "data.json", "metrics.jsonl", "notices.jsonl", "report.md"]
    {
        let path = bench.path(&format!("run/{name}"));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
    }
    bench.succeed("train --resume run --compnodes 1 --set train.steps=9");
    let names = names(&bench.path("run"));
    assert_eq!(names.iter().filter(|name| name.ends_with(".other")).count(), 7, "{names:?}");
    std::fs::remove_file(bench.path("run/run.json")).unwrap();
    std::fs::create_dir(bench.path("run/run.json")).unwrap();
    let output = bench.run("train --resume run --compnodes 1 --set train.steps=10");
    let err = text(&output.stderr);
    assert!(
        output.status.code() == Some(2) && err.contains("run.json is damaged") && err.contains("move it away"),
        "{err}"
    );
    std::fs::remove_dir(bench.path("run/run.json")).unwrap();
    bench.succeed("train --resume run --compnodes 1 --set train.steps=10");
}

/// The report and the trace, before they are there.
#[test]
fn what_has_the_name_of_a_file_to_come_is_kept_aside() {
    let bench = Bench::new();
    let run = start(&bench, "");
    std::fs::create_dir(bench.path("run/report.md")).unwrap();
    bench.write("run/loss-bytes.svg", "theirs");
    let (code, out, err) = run.finish();
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert!(err.contains("report.md.other"), "{err}");
    let report = std::fs::read_to_string(bench.path("run/report.md")).unwrap();
    assert!(report.contains("report.md.other") && bench.path("run/report.md.other").is_dir(), "{report}");
    assert_eq!(std::fs::read_to_string(bench.path("run/loss-bytes.svg.other")).unwrap(), "theirs");
}

#[test]
fn a_run_directory_that_is_made_again_has_all_its_files() {
    let bench = Bench::new();
    let mut run = start(&bench, "");
    wait_until(|| bench.path("run/trace.json").is_file(), "a trace");
    let mut before = names(&bench.path("run"));
    before.retain(|name| !name.ends_with(".tmp"));
    meanwhile(&run, || std::fs::remove_dir_all(bench.path("run")).unwrap());
    run.wait_for("is not there any more, it was renamed or removed");
    ends_well(run);
    let after = names(&bench.path("run"));
    assert!(before.iter().all(|name| after.contains(name)), "{before:?} {after:?}");
}

/// Whoever stops a run is told what is there, and not what was.
#[test]
fn the_way_on_is_looked_up() {
    for replaced in [false, true] {
        let bench = Bench::new();
        bench.succeed("train job.toml --out other --compnodes 1");
        let mut run = bench.start(
            "train job.toml --out run --compnodes 1 --json --set train.steps=1000000 --set train.eval_every=0 \
             --set checkpoint.every=1000 --set checkpoint.keep=0",
        );
        run.wait_for("step-1000\"");
        meanwhile(&run, || match replaced {
            false => std::fs::remove_dir_all(bench.path("run/checkpoints/step-1000")).unwrap(),
            true => {
                std::fs::rename(bench.path("run"), bench.path("moved")).unwrap();
                std::fs::rename(bench.path("other"), bench.path("run")).unwrap();
            }
        });
        let told = run.wait_for("is not there any more");
        run.signal("INT");
        let (_, _, err) = run.finish();
        let gone = "the checkpoint of step 1000 is not in";
        let newest = bench.path("run/checkpoints/step-2000").is_dir();
        let hint = if newest && !replaced { "goes on from the checkpoint of step 2000" } else { gone };
        assert!(err.contains(hint), "{told}\n{err}");
    }
}
