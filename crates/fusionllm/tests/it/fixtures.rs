//! Files of this version, which later ones must read.

use crate::copy::copy_fixture;
use crate::process::{Bench, losses};

/// The fixture `tests/runs-v2`, copied to where the commands run.
fn fixture() -> Bench {
    let bench = Bench::new();
    copy_fixture("runs-v2", &bench.path(""), None);
    bench
}

#[test]
fn a_run_of_this_version_is_read_and_goes_on_with_its_losses() {
    let bench = fixture();
    let before = losses(&bench.path("run"));
    // What an interrupted optimizer and error feedback held is read, too: steps 5 and 6 come again as they were, but for
    // what another processor rounds otherwise.
    let out = bench.succeed("train --resume run --step 4 --set data.path=text.txt");
    assert!(out.contains("step 4"), "{out}");
    let after = losses(&bench.path("run"));
    assert_eq!(after.len(), 6);
    assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() <= 1e-4 * a), "{before:?} {after:?}");
    assert!(bench.path("run/checkpoints/step-6.abandoned").is_dir());
    bench.succeed("export run hf");
    bench.succeed("generate run --tokens 2 --prompt a");
}

#[test]
fn a_store_of_this_version_is_read() {
    let bench = fixture();
    let state = bench.path("state");
    fusionllm_transport::make_private_dir(&state).unwrap();
    let store = state.join("broker.redb");
    std::fs::rename(bench.path("broker.redb"), &store).unwrap();
    // A checkout does not know that it is the owner's alone.
    #[cfg(unix)]
    std::fs::set_permissions(&store, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json");
    broker.wait_for("ticket");
    let status: serde_json::Value = serde_json::from_str(&bench.succeed("status --state state --json")).unwrap();
    let job = &status["jobs"][0];
    assert_eq!((&job["name"], &job["step"], &job["steps"]), (&"fixture".into(), &6.into(), &6.into()), "{status}");
    assert_eq!(job["state"]["state"], "done", "{status}");
    broker.signal("INT");
    assert_eq!(broker.finish().0, Some(0));
}
