//! What a broker and CompNodes keep on disk: tickets that end, folders that are full or others', a broker that was killed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

#[cfg(target_os = "linux")]
use crate::disk::Disk;
use crate::process::{Bench, LIMIT, Running, json_lines, text};

fn start(bench: &Bench, state: &str) -> (Running, String) {
    let mut broker =
        bench.start(&format!("broker --bind 127.0.0.1:0 --state {state} --runs runs --json --show-ticket"));
    let line: Value = serde_json::from_str(&broker.wait_for("ticket")).unwrap();
    (broker, line["ticket"].as_str().unwrap().to_owned())
}

fn status(bench: &Bench) -> Value {
    serde_json::from_str(&bench.succeed("status --state state --json")).unwrap()
}

/// A ticket made with these options.
fn made(bench: &Bench, state: &str, options: &str) -> String {
    let made = bench.succeed(&format!("ticket new {options} --state {state} --json"));
    let made: Value = serde_json::from_str(&made).unwrap();
    made["ticket"].as_str().unwrap().to_owned()
}

fn is_there(bench: &Bench, name: &str) -> bool {
    status(bench)["compnodes"].as_array().unwrap().iter().any(|c| c["name"] == name)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn join_line(ticket: &str, name: &str) -> String {
    format!("join {ticket} --name {name} --bind 127.0.0.1:0 --device cpu --data .")
}

/// Code and standard error of a command.
fn outcome(bench: &Bench, arguments: &str) -> (Option<i32>, String) {
    let output = bench.run(arguments);
    (output.status.code(), text(&output.stderr))
}

#[test]
fn an_expired_ticket_lets_nobody_new_in() {
    let bench = Bench::new();
    let (_broker, _) = start(&bench, "state");
    // Long enough for a process to start on a machine that has much to do.
    let valid = made(&bench, "state", "--role join --name lasting --expires 60s");
    let join = made(&bench, "state", "--role join --name rented --expires 1s");
    let operate = made(&bench, "state", "--role operate --name visitor --expires 1s");
    let _node = bench.start(&join_line(&valid, "early"));
    wait_until("the CompNode", || is_there(&bench, "early"));
    let expired = |name: &str| {
        let listed: Value = serde_json::from_str(&bench.succeed("ticket list --state state --json")).unwrap();
        listed.as_array().unwrap().iter().any(|ticket| ticket["name"] == name && ticket["state"] == "expired")
    };
    // What they allow ends by itself.
    wait_until("the end of the tickets", || expired("rented") && expired("visitor"));
    for (line, name) in [(format!("status --ticket {operate}"), "visitor"), (join_line(&join, "late"), "rented")] {
        let (code, err) = outcome(&bench, &line);
        assert!(code == Some(2) && err.contains(&format!("the ticket `{name}` has expired")), "{err}");
    }
}

#[test]
fn a_ticket_for_one_use_is_not_used_twice() {
    let bench = Bench::new();
    let (_broker, _) = start(&bench, "state");
    let join = made(&bench, "state", "--role join --name rented --once");
    let node = bench.start(&join_line(&join, "first"));
    wait_until("the CompNode", || is_there(&bench, "first"));
    let (code, err) = outcome(&bench, &join_line(&join, "second"));
    assert!(code == Some(2) && err.contains("the ticket `rented` was for one use, and has been used"), "{err}");
    // Nor when the first one has gone.
    drop(node);
    let (code, err) = outcome(&bench, &join_line(&join, "second"));
    assert!(code == Some(2) && err.contains("was for one use"), "{err}");
    let operate = made(&bench, "state", "--role operate --name visitor --once");
    bench.succeed(&format!("status --ticket {operate}"));
    let (code, err) = outcome(&bench, &format!("status --ticket {operate}"));
    assert!(code == Some(2) && err.contains("the ticket `visitor` was for one use"), "{err}");
}

/// A broker that is killed knows afterwards what the run directory knows, and nothing of two times.
#[cfg(unix)]
#[test]
fn a_killed_broker_shows_the_step_and_the_loss_of_one_time() {
    let bench = Bench::new();
    let (broker, ticket) = start(&bench, "state");
    let node = bench.start(&join_line(&ticket, "office"));
    wait_until("the CompNode", || is_there(&bench, "office"));
    let keys = "--set train.steps=100000 --set survive.enabled=false";
    let mut follow = bench.start(&format!("submit job.toml --state state --follow --json {keys}"));
    // What was told of each step.
    let mut told: BTreeMap<u64, f64> = BTreeMap::new();
    let mut hear = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        let metrics = &event["metrics"];
        if let Some((step, loss)) = metrics["step"].as_u64().zip(metrics["loss"].as_f64()) {
            told.insert(step, loss);
        }
    };
    loop {
        let line = follow.line().unwrap();
        hear(&line);
        if line.contains("\"step\":40,") {
            break;
        }
    }
    broker.signal("KILL");
    let (_, rest, _) = follow.finish();
    rest.lines().for_each(hear);
    drop((broker, node));
    let run: PathBuf = std::fs::read_dir(bench.path("runs")).unwrap().next().unwrap().unwrap().path();
    let id: Value = serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap();
    let id = id["run"].as_str().unwrap();
    let partial = run.join(format!("checkpoints/step-99999.partial-{}-1", &id[..8]));
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("run.id"), id).unwrap();
    std::fs::write(partial.join("shard-0.safetensors"), "half").unwrap();

    let (_broker, _) = start(&bench, "state");
    let job = status(&bench)["jobs"][0].clone();
    for metrics in json_lines(&run.join("metrics.jsonl")) {
        told.insert(metrics["step"].as_u64().unwrap(), metrics["loss"].as_f64().unwrap());
    }
    let loss = told.get(&job["step"].as_u64().unwrap()).copied();
    assert!(loss.is_some() && job["loss"].as_f64() == loss, "{job}: {told:?}");
    assert!(!partial.exists(), "half a checkpoint is no use to anybody");
    // It would be taken back as it is, were its CompNode there.
    wait_until("the job has failed", || status(&bench)["jobs"][0]["state"]["state"] == "failed");
    let (code, err) = outcome(&bench, "resume 1 --state state --step 3");
    assert!(code == Some(2) && err.contains("no checkpoint of step 3, expected one of step-"), "{err}");
    std::fs::remove_dir_all(run.join("checkpoints")).unwrap();
    let (code, err) = outcome(&bench, "resume 1 --state state --step 3");
    assert!(code == Some(2) && err.contains("no checkpoint of step 3, nor of any other step"), "{err}");
}

#[cfg(unix)]
#[test]
fn a_state_folder_that_is_others_is_left_to_them() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    std::fs::set_permissions(bench.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let (code, err) = outcome(&bench, "broker --bind 127.0.0.1:0 --state .");
    assert!(code == Some(2) && err.contains("give --state a folder of its own") && !err.contains("chmod"), "{err}");
    let (code, err) = outcome(&bench, "join x --state text.txt");
    assert_ne!(code, Some(0), "{err}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_state_disk_is_named_and_keeps_no_ticket_from_being_revoked() {
    let bench = Bench::new();
    let Some(disk) = Disk::mount(bench.path("disk"), 6 << 10) else { return };
    let (broker, _) = start(&bench, "disk/state");
    let visitor = made(&bench, "disk/state", "--role operate --name visitor");
    let status = format!("status --ticket {visitor}");
    bench.succeed(&status);
    disk.fill();
    let (code, err) = outcome(&bench, "ticket revoke visitor --state disk/state");
    assert!(
        code == Some(1) && err.contains("`visitor` is revoked") && err.contains("No space left on device"),
        "{err}"
    );
    assert!(err.contains("revoke it again"), "{err}");
    let (code, err) = outcome(&bench, &status);
    assert!(code == Some(2) && err.contains("the ticket `visitor` was revoked"), "{err}");
    disk.make_room();
    bench.succeed("ticket revoke visitor --state disk/state");
    broker.signal("INT");
    assert_eq!(broker.finish().0, Some(0));

    disk.fill();
    for state in ["disk/new", "disk/state"] {
        let mut broker = bench.command(&format!("broker --bind 127.0.0.1:0 --state {state} --runs runs --json"));
        let broker = broker.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        // It starts where all that it needs is there.
        let Some(err) = ended_or_running(broker) else {
            assert_eq!(state, "disk/state");
            continue;
        };
        let folder = Path::new(state).display().to_string();
        assert!(err.contains(&format!("the disk of the state folder {folder} is full")), "{err}");
        assert!(err.contains("make room on it"), "{err}");
    }
    // Nor does a CompNode come that could never save anything.
    let (broker, ticket) = start(&bench, "state");
    let (code, err) = outcome(&bench, &format!("{} --state disk/node", join_line(&ticket, "full")));
    assert!(code == Some(1) && err.contains("disk/node") && err.contains("--state DIR"), "{err}");
    drop(broker);
}

/// What a process says that ends by itself; nothing of one that begins to serve, which is ended.
#[cfg(target_os = "linux")]
fn ended_or_running(mut child: std::process::Child) -> Option<String> {
    use std::io::{BufRead, BufReader, Read};
    let mut line = String::new();
    let read = BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if read > 0 {
        child.kill().unwrap();
        child.wait().unwrap();
        return None;
    }
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{err}");
    Some(err)
}
