//! Tests of checkpoints.

use std::sync::Arc;

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Generation, RunId};

use super::find::meant;
use super::finish::{Course, Pruned};
use super::names::{ABANDONED, ASIDE, MARK};
use super::*;
use crate::model::load_model;
use crate::run_dir::{RunFile, RunHome};
use crate::testing;

const GENERATION: Generation = Generation(1);

/// All is well up to any step.
const GOOD: Course = Course { lowest: 2.0, vouched: u64::MAX };

/// A run whose checkpoints lie in `folder`.
fn run_file(folder: &Path, id: u8) -> RunFile {
    RunFile {
        run: RunId::from_bytes([id; 16]),
        name: "run".to_owned(),
        dir: folder.join("dir"),
        copy_of: Vec::new(),
        from: None,
        checkpoints: Some(folder.to_owned()),
        unnamed_up_to: None,
        manifests: std::collections::BTreeMap::new(),
    }
}

fn home(folder: &Path, id: u8) -> RunHome {
    let file = run_file(folder, id);
    RunHome { dir: file.dir.clone(), file: Some(file), spec: Some(testing::spec(&[])) }
}

/// The shards of a checkpoint at `step`, gathered.
fn gather(folder: &Path, id: u8, step: u64, loss: f64) -> (FinishSpec, ShardPlace) {
    let spec = testing::spec(&[]);
    let dag = load_model(&spec).unwrap().dag;
    let names: Vec<String> = dag.params().iter().map(|p| p.name.clone()).collect();
    let (head, tail) = names.split_at(4);
    std::fs::create_dir_all(folder).unwrap();
    let place = ShardPlace::new(RunId::from_bytes([id; 16]), folder.to_owned()).unwrap();
    let partial = place.partial(step, GENERATION);
    make_partial(&partial, &place.run).unwrap();
    let shard = |node: u32, params: &[String]| {
        let path = partial.join(shard_name(NodeIndex(node)));
        let tensors: Vec<(String, Vec<usize>)> = params
            .iter()
            .flat_map(|name| {
                let shape = dag.param(dag.find_param(name).unwrap()).shape.clone();
                [(name.clone(), shape.clone()), (format!("optimizer.exp_avg.{name}"), shape)]
            })
            .collect();
        testing::write_tensors(&path, &tensors);
        let bytes = std::fs::read(&path).unwrap();
        let mut hash = ShardHash::default();
        hash.update(&bytes);
        let (blake3, not_finite) = hash.finish();
        (StoredShard { bytes: bytes.len() as u64, blake3, not_finite }, params.to_vec())
    };
    let shards = vec![shard(0, head), shard(1, tail)];
    let finish = FinishSpec {
        generation: GENERATION,
        step,
        loss: Some(loss),
        spec,
        dag: Arc::new(dag),
        origin: Origin::default(),
        shards,
    };
    (finish, place)
}

/// A checkpoint of two shards at `step`; returns its folder.
fn make_of(folder: &Path, id: u8, step: u64, loss: f64) -> PathBuf {
    let (spec, place) = gather(folder, id, step, loss);
    finish(&spec, &place, &run_file(folder, id)).unwrap().path
}

fn make(folder: &Path, step: u64) -> PathBuf {
    make_of(folder, 1, step, 2.0)
}

fn steps(folder: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> = steps_in(folder).unwrap().into_iter().map(|(step, _)| step).collect();
    steps.sort_unstable();
    steps
}

fn error(path: &Path) -> String {
    open_checkpoint(path).unwrap_err().to_string()
}

#[test]
fn a_checkpoint_gives_back_what_went_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5);
    assert_eq!(path, folder.path().join("step-5"));
    let checkpoint = open_checkpoint(&path).unwrap();
    assert_eq!((checkpoint.manifest().step, checkpoint.manifest().loss), (5, Some(2.0)));
    assert_eq!(checkpoint.manifest().run, Some(RunId::from_bytes([1; 16])));
    for param in checkpoint.dag().params() {
        let (shape, bytes) = checkpoint.tensor(&param.name).unwrap();
        assert_eq!((&shape, bytes.len() as u64), (&param.shape, param.bytes()));
        assert_eq!(bytes, testing::tensor_bytes(&param.name, &param.shape));
    }
    assert!(checkpoint.tensor("nothing").unwrap_err().to_string().contains("is missing"));
}

#[test]
fn a_part_holds_its_parameters_and_their_optimizer_state() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open_checkpoint(&make(folder.path(), 5)).unwrap();
    // Across both shards.
    let params: Vec<String> = checkpoint.dag().params()[3..6].iter().map(|p| p.name.clone()).collect();
    let out = folder.path().join("part");
    let bytes = checkpoint.weights_blob(&params, &out).unwrap();
    let content = std::fs::read(&out).unwrap();
    assert_eq!(bytes, content.len() as u64);
    let file = safetensors::SafeTensors::deserialize(&content).unwrap();
    assert_eq!(file.len(), 6);
    for param in &checkpoint.dag().params()[3..6] {
        let state = format!("optimizer.exp_avg.{}", param.name);
        assert_eq!(file.tensor(&param.name).unwrap().data(), testing::tensor_bytes(&param.name, &param.shape));
        assert_eq!(file.tensor(&state).unwrap().data(), testing::tensor_bytes(&state, &param.shape));
    }
}

#[test]
fn a_run_directory_means_its_newest_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains("holds no checkpoint"));
    let checkpoints = folder.path().join("checkpoints");
    for step in [2, 10, 9] {
        make(&checkpoints, step);
    }
    let (_, place) = gather(&checkpoints, 1, 11, 2.0);
    assert_eq!(open_checkpoint(folder.path()).unwrap().manifest().step, 10);
    assert_eq!(remove_partial(&checkpoints, &place.run), Removal::default());
    assert_eq!(std::fs::read_dir(&checkpoints).unwrap().count(), 3);
}

#[test]
fn only_the_newest_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        make(folder.path(), step);
        assert!(prune(&home(folder.path(), 1), 2, GOOD).removal == Removal::default());
    }
    assert_eq!(steps(folder.path()), [4, 5]);
    // The same step again.
    make(folder.path(), 5);
    prune(&home(folder.path(), 1), 2, GOOD);
    assert_eq!(steps(folder.path()), [4, 5]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_good_checkpoint_outlives_those_of_a_loss_that_has_exploded() {
    let folder = tempfile::tempdir().unwrap();
    let mut course = Course::default();
    for (step, loss) in [(1, 5.0), (2, 3.0), (3, 4.0), (4, 1e9), (5, 2e9), (6, 3e9)] {
        course.step(step, loss, None);
        make_of(folder.path(), 1, step, loss);
        prune(&home(folder.path(), 1), 2, course);
    }
    // The update after step 3 made the loss of step 4.
    assert_eq!(course.vouched, 2);
    assert_eq!(steps(folder.path()), [2, 5, 6]);
    // It recovers.
    for (step, loss) in [(7, 3.5), (8, 3.0)] {
        course.step(step, loss, Some(loss));
        make_of(folder.path(), 1, step, loss);
        prune(&home(folder.path(), 1), 2, course);
    }
    assert_eq!(steps(folder.path()), [7, 8]);
}

#[test]
fn the_lowest_loss_outlives_a_slow_explosion_before_any_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut course = Course::default();
    course.step(1, 3.0, None);
    for (step, loss) in [(2, 5.5), (3, 6.0), (4, 8.0), (5, 30.0), (6, 1e12)] {
        course.step(step, loss, None);
        make_of(folder.path(), 1, step, loss);
        prune(&home(folder.path(), 1), 1, course);
    }
    assert_eq!(course.vouched, 0, "all of them have exploded");
    assert_eq!(steps(folder.path()), [2, 6]);
}

#[test]
fn two_runs_in_one_folder_leave_each_other_alone() {
    let folder = tempfile::tempdir().unwrap();
    for step in [2, 4, 6] {
        make_of(folder.path(), 1, step, 2.0);
    }
    for step in [1, 3, 5] {
        make_of(folder.path(), 2, step, 2.0);
    }
    let newest = |id| open_newest(&home(folder.path(), id), None).unwrap().checkpoint.manifest().step;
    assert_eq!((newest(1), newest(2)), (6, 5));
    assert_eq!(prune(&home(folder.path(), 1), 1, GOOD).dropped, [4, 2]);
    assert_eq!(steps(folder.path()), [1, 3, 5, 6]);
    let (_, other) = gather(folder.path(), 2, 9, 2.0);
    assert_eq!(remove_partial(folder.path(), &RunId::from_bytes([1; 16])), Removal::default());
    assert!(other.partial(9, GENERATION).is_dir());
    let error = error(folder.path());
    assert!(error.contains("several runs") && error.contains("step-5 (run 02020202)"), "{error}");
    let step = open_newest(&home(folder.path(), 2), Some(3)).unwrap().checkpoint.manifest().step;
    assert_eq!(step, 3);
    let error = open_newest(&home(folder.path(), 2), Some(6)).unwrap_err().to_string();
    assert!(error.contains("no checkpoint of step 6, expected one of step-5, step-3, step-1"), "{error}");
}

#[test]
fn what_others_made_is_neither_overwritten_nor_removed() {
    let folder = tempfile::tempdir().unwrap();
    let keep = |name: &str| folder.path().join(name).join("keep");
    for name in ["step-1", "step-2", "step-7.partial-9", "step-8.partial-01010101-1", "step-3.replaced"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        std::fs::write(keep(name), b"mine").unwrap();
    }
    std::fs::write(folder.path().join("step-4"), b"a file").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.path().join("step-1"), folder.path().join("step-5")).unwrap();
    let file = run_file(folder.path(), 1);
    for step in 1..=6 {
        let (spec, place) = gather(folder.path(), 1, step, 2.0);
        let finished = finish(&spec, &place, &file).unwrap();
        let is_taken = finished.path.parent() != Some(folder.path());
        assert_eq!(is_taken, [1, 2, 4, 5].contains(&step), "{finished:?}");
        let named =
            finished.notices.first().is_some_and(|n| n.contains(&format!("step-{step}")) && n.contains("left alone"));
        assert_eq!(named, is_taken);
        prune(&home(folder.path(), 1), 1, GOOD);
    }
    assert_eq!(recover(folder.path(), &file.run), Removal::default());
    // What cannot be removed is said, and stays.
    assert_eq!(remove_partial(folder.path(), &file.run).failures.len(), 1);
    abandon(&home(folder.path(), 1), 0).unwrap();
    for name in ["step-1", "step-2", "step-7.partial-9", "step-8.partial-01010101-1", "step-3.replaced"] {
        assert_eq!(std::fs::read(keep(name)).unwrap(), b"mine", "{name}");
    }
    assert_eq!(std::fs::read(folder.path().join("step-4")).unwrap(), b"a file");
    let place = ShardPlace::new(file.run.clone(), folder.path().to_owned()).unwrap();
    let error = make_partial(&place.partial(8, GENERATION), &file.run).unwrap_err().to_string();
    assert!(error.contains("step-8.partial-01010101-1 is in the way"), "{error}");
}

/// Whoever keeps notes beside a checkpoint finds them again, wherever the run removes one.
#[test]
fn files_of_others_outlive_the_checkpoint_that_they_lie_in() {
    let folder = tempfile::tempdir().unwrap();
    let file = run_file(folder.path(), 1);
    let write = |path: PathBuf| {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "mine").unwrap();
    };
    let kept = |name: &str, inner: &str| {
        assert_eq!(std::fs::read(folder.path().join(name).join(inner)).unwrap(), b"mine", "{name}");
    };
    // Pruned.
    let old = make(folder.path(), 1);
    write(old.join("notes.txt"));
    write(old.join("plots/shard-0.safetensors"));
    write(old.join("shard-9.safetensors"));
    write(old.join("shard-0.safetensors.Ab12Cd.tmp"));
    make(folder.path(), 2);
    let pruned = prune(&home(folder.path(), 1), 1, GOOD);
    assert_eq!((pruned.dropped, pruned.removal.failures.len()), (vec![1], 0));
    let said = &pruned.removal.leftovers[0];
    assert!(said.contains("`notes.txt`, `plots`, `shard-9.safetensors`") && said.contains("step-1.leftover"), "{said}");
    let left = folder.path().join("step-1.leftover");
    assert_eq!(std::fs::read_dir(&left).unwrap().count(), 3, "what the run wrote is gone");
    for inner in ["notes.txt", "plots/shard-0.safetensors", "shard-9.safetensors"] {
        kept("step-1.leftover", inner);
    }
    assert!(error(&left).contains("no whole checkpoint"), "{}", error(&left));
    assert_eq!(prune(&home(folder.path(), 1), 1, GOOD), Pruned::default(), "it is said once");

    // Replaced by another of its step.
    write(folder.path().join("step-2/notes.txt"));
    let (spec, place) = gather(folder.path(), 1, 2, 2.0);
    let finished = finish(&spec, &place, &file).unwrap();
    assert!(finished.notices[0].contains("step-2.leftover"), "{finished:?}");
    kept("step-2.leftover", "notes.txt");
    open_checkpoint(&folder.path().join("step-2")).unwrap();

    // Never whole.
    gather(folder.path(), 1, 3, 2.0);
    write(place.partial(3, GENERATION).join("notes.txt"));
    let removal = remove_partial(folder.path(), &file.run);
    assert_eq!((removal.failures.len(), removal.leftovers.len()), (0, 1));
    kept("step-3.leftover", "notes.txt");
    assert_eq!(remove_partial(folder.path(), &file.run), Removal::default());
    // What stands in the way of shards costs the checkpoint, and nothing of whoever put it there.
    let (taken, gathered) = (place.partial(4, GENERATION), place.partial(5, GENERATION));
    write(taken.join("notes.txt"));
    assert_eq!(drop_partial(&taken, &file.run), Removal::default());
    assert!(taken.join("notes.txt").is_file());
    gather(folder.path(), 1, 5, 2.0);
    assert_eq!(drop_partial(&gathered, &file.run), Removal::default());
    assert!(!gathered.exists());
}

#[test]
fn shards_that_come_at_once_share_their_folder() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("checkpoints");
    std::fs::create_dir(&inside).unwrap();
    let place = ShardPlace::new(RunId::from_bytes([1; 16]), inside).unwrap();
    for step in 0..100 {
        let partial = place.partial(step, GENERATION);
        std::thread::scope(|scope| {
            let made: Vec<_> = (0..4).map(|_| scope.spawn(|| make_partial(&partial, &place.run))).collect();
            for made in made {
                made.join().unwrap().unwrap();
            }
        });
    }
    // A crash may leave half a mark.
    let partial = place.partial(7, GENERATION);
    std::fs::write(partial.join(MARK), "0101").unwrap();
    make_partial(&partial, &place.run).unwrap();
    std::fs::write(partial.join(MARK), "").unwrap();
    assert_eq!(remove_partial(&place.folder, &place.run), Removal::default());
    assert_eq!(std::fs::read_dir(&place.folder).unwrap().count(), 0);
}

/// Whatever comes in meanwhile, a folder of the run stays known as its own.
#[test]
fn a_shard_that_comes_while_its_folder_is_removed_leaves_none_without_a_mark() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let folder = tempfile::tempdir().unwrap();
    let place = ShardPlace::new(RunId::from_bytes([1; 16]), folder.path().to_owned()).unwrap();
    let partial = place.partial(3, GENERATION);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for node in 0.. {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                let _ = std::fs::write(partial.join(shard_name(NodeIndex(node))), "half");
            }
        });
        let made = (0..300).try_for_each(|_| {
            let made = make_partial(&partial, &place.run);
            drop_partial(&partial, &place.run);
            made
        });
        is_over.store(true, Ordering::Relaxed);
        made.unwrap();
    });
    let left = remove_partial(folder.path(), &place.run);
    assert_eq!((left, std::fs::read_dir(folder.path()).unwrap().count()), (Removal::default(), 0));
}

/// On a full disk the mark may not fit.
#[test]
fn shards_without_room_for_a_mark_are_dropped_too() {
    let folder = tempfile::tempdir().unwrap();
    let place = ShardPlace::new(RunId::from_bytes([1; 16]), folder.path().to_owned()).unwrap();
    let partial = place.partial(3, GENERATION);
    for mark in [None, Some("")] {
        std::fs::create_dir(&partial).unwrap();
        mark.iter().for_each(|text| std::fs::write(partial.join(MARK), text).unwrap());
        assert_eq!(drop_partial(&partial, &place.run), Removal::default());
        assert!(!partial.exists());
    }
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("precious"), "").unwrap();
    drop_partial(&partial, &place.run);
    assert!(partial.join("precious").exists());
}

#[cfg(unix)]
#[test]
fn an_old_checkpoint_that_stays_makes_its_successor_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let old = make(folder.path(), 5);
    // A folder where the manifest was cannot be removed like a file.
    std::fs::remove_file(old.join(MANIFEST)).unwrap();
    std::fs::create_dir(old.join(MANIFEST)).unwrap();
    let (spec, place) = gather(folder.path(), 1, 5, 2.0);
    let finished = finish(&spec, &place, &run_file(folder.path(), 1)).unwrap();
    assert_eq!((finished.path, finished.notices.len()), (old.clone(), 1));
    assert!(finished.notices[0].contains(&format!("step-5{ASIDE}")), "{:?}", finished.notices);
    assert!(old.join(MANIFEST).is_file());
}

#[test]
fn an_abandoned_future_is_kept_aside_and_not_found() {
    let folder = tempfile::tempdir().unwrap();
    for step in [5, 8, 10] {
        make(folder.path(), step);
    }
    let aside = abandon(&home(folder.path(), 1), 5).unwrap().aside;
    assert_eq!(aside.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [10, 8]);
    assert_eq!(open_newest(&home(folder.path(), 1), None).unwrap().checkpoint.manifest().step, 5);
    make(folder.path(), 10);
    assert_eq!(
        abandon(&home(folder.path(), 1), 9).unwrap().aside[0].1,
        folder.path().join(format!("step-10{ABANDONED}-2"))
    );
    // It can still be had by its path.
    assert_eq!(open_checkpoint(&folder.path().join(format!("step-10{ABANDONED}"))).unwrap().manifest().step, 10);
}

#[test]
fn a_crash_while_a_checkpoint_takes_anothers_place_loses_neither() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunId::from_bytes([1; 16]);
    make(folder.path(), 5);
    let (aside, whole) = (folder.path().join(format!("step-5{ASIDE}")), folder.path().join("step-5"));
    // After the first rename.
    std::fs::rename(&whole, &aside).unwrap();
    assert_eq!(open_newest(&home(folder.path(), 1), None).unwrap().checkpoint.manifest().step, 5);
    assert_eq!(recover(folder.path(), &run), Removal::default());
    assert!(whole.is_dir() && !aside.exists());
    // After the second.
    std::fs::rename(&whole, &aside).unwrap();
    make(folder.path(), 5);
    std::fs::create_dir_all(&aside).unwrap();
    std::fs::write(aside.join(MARK), run.as_str()).unwrap();
    assert_eq!(steps(folder.path()), [5], "it counts once");
    assert_eq!(recover(folder.path(), &run), Removal::default());
    assert!(whole.is_dir() && !aside.exists());
}

#[test]
fn what_cannot_be_removed_does_not_stand_in_the_way_of_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), 5);
    let aside = folder.path().join(format!("step-5{ASIDE}"));
    // No file, so it is not removed as one.
    std::fs::create_dir_all(aside.join(MANIFEST)).unwrap();
    std::fs::write(aside.join(MARK), RunId::from_bytes([1; 16]).as_str()).unwrap();
    make(folder.path(), 5);
    assert!(!aside.exists() && folder.path().join("step-5.leftover").join(MANIFEST).is_dir());
    assert_eq!(open_checkpoint(&folder.path().join("step-5")).unwrap().manifest().step, 5);
}

#[test]
fn a_manifest_that_is_no_text_is_called_one() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = make(folder.path(), 4);
    std::fs::write(checkpoint.join(MANIFEST), [0xff, 0xfe, 0]).unwrap();
    let error = error(folder.path());
    assert!(error.contains("manifest.json") && !error.contains("safetensors"), "{error}");
}

#[test]
fn a_damaged_newest_is_passed_over_when_a_run_goes_on_and_refused_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), 4);
    let newest = make(folder.path(), 8);
    std::fs::remove_file(newest.join("shard-1.safetensors")).unwrap();
    let found = open_newest(&home(folder.path(), 1), None).unwrap();
    assert_eq!(found.checkpoint.manifest().step, 4);
    assert!(found.passed_over[0].to_string().contains("shard-1.safetensors is missing"));
    let error = error(folder.path());
    assert!(error.contains("shard-1.safetensors is missing") && error.contains("that of step 4"), "{error}");
    assert!(open_newest(&home(folder.path(), 1), Some(8)).is_err(), "the one that was asked for");
}

/// A folder that was renamed or copied would be put aside as later than itself; one of another run has other weights.
#[test]
fn a_folder_whose_name_or_mark_is_not_its_own_is_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), 4);
    let renamed = make(folder.path(), 8);
    std::fs::rename(&renamed, folder.path().join("step-100")).unwrap();
    let found = open_newest(&home(folder.path(), 1), None).unwrap();
    assert_eq!(found.checkpoint.manifest().step, 4);
    let why = found.passed_over[0].to_string();
    assert!(why.contains("step-100 is no") && why.contains("its manifest is of step 8"), "{why}");

    let foreign = make(folder.path(), 6);
    std::fs::write(foreign.join(MARK), RunId::from_bytes([9; 16]).as_str()).unwrap();
    let error = error(&foreign);
    assert!(error.contains("its mark of run 09090909"), "{error}");
}

#[test]
fn every_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5);
    let shard = path.join("shard-1.safetensors");
    let whole = std::fs::read(&shard).unwrap();

    std::fs::write(&shard, &whole[..whole.len() - 1]).unwrap();
    assert!(error(&path).contains("shard-1.safetensors has"), "{}", error(&path));
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, &flipped).unwrap();
    assert!(error(&path).contains("has hash"), "{}", error(&path));
    std::fs::remove_file(&shard).unwrap();
    assert!(error(&path).contains("shard-1.safetensors is missing"), "{}", error(&path));
    std::fs::write(&shard, &whole).unwrap();
    open_checkpoint(&path).unwrap();

    let manifest = path.join(MANIFEST);
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(error(&path).contains("checkpoint manifest: not readable"), "{}", error(&path));
    std::fs::write(&manifest, text.replace("shard-1.safetensors", "../shard")).unwrap();
    assert!(error(&path).contains("its checksum is"), "{}", error(&path));
    let mut other = Manifest::from_json(&text).unwrap();
    other.shards[1].file = "../shard".to_owned();
    std::fs::write(&manifest, other.seal().unwrap()).unwrap();
    assert!(error(&path).contains("is not a plain file name"), "{}", error(&path));
    std::fs::remove_file(&manifest).unwrap();
    assert!(error(&path).contains("manifest.json is missing"), "{}", error(&path));
}

#[test]
fn every_flipped_bit_of_a_manifest_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5).join(MANIFEST);
    let text = std::fs::read(&path).unwrap();
    for at in 0..text.len() {
        let mut flipped = text.clone();
        flipped[at] ^= 1 << (at % 8);
        // What is no UTF-8 is found before it is read.
        let Ok(flipped) = String::from_utf8(flipped) else { continue };
        assert!(Manifest::from_json(&flipped).is_err(), "byte {at}: {:?}", flipped.get(at.saturating_sub(9)..at + 9));
    }
}

#[test]
fn a_manifest_that_was_exchanged_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5);
    let first = open_at(&path, None).unwrap().manifest().checksum.clone();
    make_of(folder.path(), 1, 5, 1.5);
    let error = open_at(&path, Some(&first)).unwrap_err().to_string();
    assert!(error.contains("manifest.json has hash") && error.contains(&first), "{error}");
}

#[test]
fn a_shard_without_its_parameters_makes_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (mut spec, place) = gather(folder.path(), 1, 3, 2.0);
    let first = place.partial(3, GENERATION).join(shard_name(NodeIndex(0)));
    testing::write_tensors(&first, &[("a".to_owned(), vec![1])]);
    let file = run_file(folder.path(), 1);
    assert!(finish(&spec, &place, &file).unwrap_err().to_string().contains("is missing"));
    // Neither does one with a value that is not finite.
    (spec, _) = gather(folder.path(), 1, 3, 2.0);
    spec.shards[1].0.not_finite = Some("transformer.ln_f.weight".to_owned());
    let error = finish(&spec, &place, &file).unwrap_err().to_string();
    assert!(error.contains("`transformer.ln_f.weight` has values that are not finite"), "{error}");
    assert!(steps(folder.path()).is_empty());
}

#[cfg(unix)]
#[test]
fn an_old_checkpoint_that_cannot_be_removed_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let old = make(folder.path(), 1);
    make(folder.path(), 2);
    // A folder where the manifest was cannot be removed like a file.
    std::fs::remove_file(old.join(MANIFEST)).unwrap();
    std::fs::create_dir(old.join(MANIFEST)).unwrap();
    let pruned = prune(&home(folder.path(), 1), 1, GOOD);
    assert!(pruned.dropped.is_empty() && pruned.removal.failures[0].contains("step-1"), "{pruned:?}");
}

#[test]
fn a_path_without_a_run_means_what_lies_in_it() {
    let folder = tempfile::tempdir().unwrap();
    make_of(&folder.path().join("run-01010101"), 1, 3, 2.0);
    assert!(matches!(meant(folder.path()).unwrap(), Meant::Folder(found) if found[0].0 == 3));
    assert!(matches!(meant(&folder.path().join("run-01010101/step-3")).unwrap(), Meant::Checkpoint(_)));
}
