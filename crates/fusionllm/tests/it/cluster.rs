//! Broker, CompNodes and commands as processes of their own.

use serde_json::Value;

use crate::process::{Bench, Running, losses, text, wait_until};

/// A broker and its ticket.
pub(crate) fn broker(bench: &Bench) -> (Running, String) {
    let mut broker = bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json --show-ticket");
    let line: Value = serde_json::from_str(&broker.wait_for("ticket")).unwrap();
    (broker, line["ticket"].as_str().unwrap().to_owned())
}

pub(crate) fn status(bench: &Bench) -> Value {
    serde_json::from_str(&bench.succeed("status --state state --json")).unwrap()
}

/// Starts a CompNode and waits until the broker shows it.
pub(crate) fn join(bench: &Bench, ticket: &str, name: &str) -> Running {
    let node = bench.start(&format!("join {ticket} --name {name} --bind 127.0.0.1:0 --device cpu --data ."));
    let has_joined = || status(bench)["compnodes"].as_array().unwrap().iter().any(|c| c["name"] == name);
    wait_until(has_joined, "it has joined");
    node
}

#[test]
fn a_job_runs_on_joined_machines_and_gives_the_losses_of_train() {
    let bench = Bench::new();
    let (broker, ticket) = broker(&bench);
    let nodes = [join(&bench, &ticket, "office"), join(&bench, &ticket, "rack")];
    let out = bench.succeed("submit job.toml --state state --follow");
    assert!(out.contains("job 1") && out.contains("step 8/8"), "{out}");

    let status = status(&bench);
    assert_eq!((&status["jobs"][0]["state"]["state"], &status["jobs"][0]["step"]), (&"done".into(), &8.into()));
    assert!(bench.succeed("status --state state").contains("office"));
    let run = status["jobs"][0]["run_dir"].as_str().unwrap().to_owned();
    bench.succeed("train job.toml --out here --compnodes 2");
    assert_eq!(losses(std::path::Path::new(&run)), losses(&bench.path("here")));

    // The CompNodes stay when the broker goes, and go when they are asked.
    broker.signal("INT");
    assert_eq!(broker.finish().0, Some(0));
    for node in nodes {
        node.signal("INT");
        let (code, _, err) = node.finish();
        assert_eq!(code, Some(0), "{err}");
    }
}

/// A job that takes long enough for something to happen to it.
const LONG: &str = "--set train.steps=300 --set train.batch=32 --set checkpoint.every=5 --set checkpoint.keep=0";

/// Waits until the only job is done, whoever submitted it may be gone.
pub(crate) fn wait_until_done(bench: &Bench) -> Value {
    let deadline = std::time::Instant::now() + crate::process::LIMIT;
    loop {
        let status = status(bench);
        if status["jobs"][0]["state"]["state"] == "done" {
            return status["jobs"][0].clone();
        }
        assert!(std::time::Instant::now() < deadline, "{status}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Every step is there once, with the loss that it has where nothing is lost. A machine that comes back late finds the
/// model cut anew, which changes the order of sums.
fn assert_undisturbed(bench: &Bench, job: &Value) {
    bench.succeed(&format!("train job.toml --out calm --compnodes 2 {LONG}"));
    let got = losses(std::path::Path::new(job["run_dir"].as_str().unwrap()));
    let calm = losses(&bench.path("calm"));
    assert!(got.len() == calm.len() && got.iter().zip(&calm).all(|(a, b)| (a - b).abs() < 1e-3 * b), "{got:?}");
}

#[test]
fn a_killed_broker_that_is_started_again_takes_its_job_back() {
    let bench = Bench::new();
    let (first, ticket) = broker(&bench);
    let _nodes = [join(&bench, &ticket, "office"), join(&bench, &ticket, "rack")];
    let mut follow = bench.start(&format!("submit job.toml --state state --follow --json {LONG}"));
    follow.wait_for("\"event\":\"checkpoint\"");
    first.signal("KILL");
    drop(first);
    let known: fusionllm::transport::Ticket = ticket.parse().unwrap();
    let again = format!("broker --bind {} --state state --runs runs --json", known.broker.addrs[0]);
    let mut again = bench.start(&again);
    again.wait_for("ticket");
    let job = wait_until_done(&bench);
    assert_undisturbed(&bench, &job);
    let report = std::path::Path::new(job["run_dir"].as_str().unwrap()).join("report.md");
    let report = std::fs::read_to_string(report).unwrap();
    assert!(report.contains("the broker restarted after step"), "{report}");
    assert!(report.contains("\n| broker restart |  | ") && report.contains("\nUseful: "), "{report}");
    let (code, _, err) = follow.finish();
    let way_on = "the job goes on by itself once the broker is back, `fusionllm status --state state` shows it then";
    assert!(code == Some(1) && err.contains(way_on), "{err}");
}

#[test]
fn a_killed_compnode_that_is_started_again_takes_part_again() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let (_office, rack) = (join(&bench, &ticket, "office"), join(&bench, &ticket, "rack"));
    let mut follow = bench.start(&format!("submit job.toml --state state --follow {LONG}"));
    follow.wait_for("checkpoint at step");
    rack.signal("KILL");
    drop(rack);
    let _rack = bench.start(&format!("join {ticket} --name rack --bind 127.0.0.1:0 --device cpu --data ."));
    let (code, out, err) = follow.finish();
    assert!(code == Some(0) && out.contains("note: CompNode `rack` vanished after step"), "{out}\n{err}");
    assert!(out.contains("recovering: ") && out.contains("training again after "), "{out}");
    assert_undisturbed(&bench, &wait_until_done(&bench));
}

#[test]
fn a_stopped_job_resumes_from_its_checkpoint_on_a_new_broker() {
    let bench = Bench::new();
    let (first, ticket) = broker(&bench);
    let node = join(&bench, &ticket, "office");
    let keys = "--set train.steps=100000 --set checkpoint.keep=0";
    let mut follow = bench.start(&format!("submit job.toml --state state --follow --json {keys}"));
    follow.wait_for("\"event\":\"checkpoint\"");
    assert!(bench.succeed("stop 1 --state state").contains("job 1 stopped"));
    let (code, _, err) = follow.finish();
    assert!(code == Some(1) && err.contains("the job was stopped"), "{err}");
    first.signal("TERM");
    node.signal("TERM");
    assert_eq!((first.finish().0, node.finish().0), (Some(0), Some(0)));

    let (second, again) = broker(&bench);
    let secret = |ticket: &str| ticket.parse::<fusionllm::transport::Ticket>().unwrap().secret.as_bytes().to_owned();
    assert_eq!(secret(&again), secret(&ticket), "it outlives the broker");
    let _node = join(&bench, &again, "office");
    let run = std::path::PathBuf::from(status(&bench)["jobs"][0]["run_dir"].as_str().unwrap());
    let done = std::fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("step-")?.parse::<usize>().ok());
    let steps = done.max().unwrap() + 4;
    let out = bench.succeed(&format!("resume 1 --state state --follow --set train.steps={steps}"));
    assert!(out.contains(&format!("step {steps}/{steps}")), "{out}");
    assert_eq!(losses(&run).len(), steps);
    drop(second);
}

#[test]
fn an_inventory_shows_machines_and_links_and_can_be_planned_by() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let (_office, _rack) = (join(&bench, &ticket, "office"), join(&bench, &ticket, "rack"));
    let inventory: Value =
        serde_json::from_str(&bench.succeed("inventory --state state --job job.toml --json")).unwrap();
    let machines = inventory["machines"].as_array().unwrap();
    assert_eq!(machines.len(), 2);
    for machine in machines {
        let number = |value: &Value| value.as_f64().unwrap();
        assert!(number(&machine["profile"]["flop_per_s"]) > 1e8, "{machine}");
        assert!(number(&machine["efficiency"]) > 0.0 && number(&machine["efficiency"]) <= 1.0, "{machine}");
        assert!(machine["measured"]["ops"].as_object().unwrap().keys().any(|k| k.starts_with("linear")), "{machine}");
    }
    let links = inventory["links"].as_array().unwrap();
    assert_eq!(links.len(), 2, "both directions: {inventory}");
    assert!(links.iter().all(|l| l["link"]["bytes_per_s"].as_f64().is_some_and(|b| b > 1e5)), "{links:?}");

    let table = bench.succeed("inventory --state state");
    assert!(table.contains("office") && table.contains("Mbit/s") && table.contains("clusters by bandwidth"), "{table}");
    std::fs::write(bench.path("here.toml"), bench.succeed("inventory --state state --job job.toml --toml")).unwrap();
    let plan = bench.succeed("plan job.toml --cluster here.toml");
    assert!(plan.contains("office") && plan.contains("predicted step"), "{plan}");
    let began = std::time::Instant::now();
    let again: Value = serde_json::from_str(&bench.succeed("inventory --state state --refresh --json")).unwrap();
    // Measured since, and not before.
    assert!(again["links"][0]["age_s"].as_f64().unwrap() <= began.elapsed().as_secs_f64(), "{again}");
}

#[test]
fn a_stranger_is_refused_and_logged() {
    let bench = Bench::new();
    let (broker, _ticket) = broker(&bench);
    // The right address and key with another secret.
    let other = Bench::new();
    let mut ticket: fusionllm::transport::Ticket =
        std::fs::read_to_string(bench.path("state/join.ticket")).unwrap().trim().parse().unwrap();
    ticket.secret = fusionllm::transport::Secret::generate();
    // With the same ticket it would be refused again.
    let output = other.run(&format!("join {ticket} --bind 127.0.0.1:0 --device cpu"));
    assert_eq!(output.status.code(), Some(2));
    let err = text(&output.stderr);
    assert!(err.contains("the ticket is not valid for this broker"), "{err}");
    let output = other.run(&format!("status --ticket {ticket}"));
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(status(&bench)["compnodes"].as_array().unwrap().len(), 0);
    broker.signal("INT");
    let (_, _, log) = broker.finish();
    assert!(log.contains("refused") && log.contains("the ticket is not valid"), "{log}");
}

/// A join ticket lets a CompNode in and commands nothing; a ticket that was revoked lets nobody in.
#[test]
fn tickets_have_roles_and_can_be_revoked() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let other = Bench::new();
    let refused = |arguments: String, words: &str| {
        let output = other.run(&arguments);
        let err = text(&output.stderr);
        assert!(output.status.code() == Some(2) && err.contains(words), "{arguments}: {err}");
    };
    for command in ["status", "stop 1", "resume 1", "submit job.toml", "inventory", "ticket list"] {
        refused(format!("{command} --ticket {ticket}"), "lets CompNodes join and nothing else");
    }
    let operate = std::fs::read_to_string(bench.path("state/operate.ticket")).unwrap();
    refused(format!("join {} --bind 127.0.0.1:0 --device cpu", operate.trim()), "is for commands");

    let make = |arguments: &str| -> Value {
        serde_json::from_str(&bench.succeed(&format!("ticket new {arguments} --state state --json"))).unwrap()
    };
    let made = make("--role operate --name visitor --expires 1h");
    let visitor = made["ticket"].as_str().unwrap();
    assert!(other.succeed(&format!("status --ticket {visitor}")).contains("CompNode"), "{made}");
    bench.succeed("ticket revoke visitor --state state");
    refused(format!("status --ticket {visitor}"), "the ticket `visitor` was revoked");

    // A CompNode that came by a ticket goes with it.
    let made = make("--role join --name rented");
    let node = join(&bench, made["ticket"].as_str().unwrap(), "rented");
    bench.succeed("ticket revoke rented --state state");
    wait_until(|| status(&bench)["compnodes"].as_array().unwrap().is_empty(), "it has left");
    drop(node);
    let listed = bench.succeed("ticket list --state state");
    assert!(listed.contains("visitor") && listed.contains("revoked"), "{listed}");
    // Where the broker's own is revoked, nobody is told to start a broker that runs.
    bench.succeed("ticket revoke operate --state state");
    let output = bench.run("status --state state");
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(2) && err.contains("as after `ticket revoke operate`"), "{err}");
}

#[test]
fn a_killed_compnode_fails_a_job_that_is_not_to_survive_it() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let (_office, rack) = (join(&bench, &ticket, "office"), join(&bench, &ticket, "rack"));
    let job = "submit job.toml --set survive.enabled=false --set train.steps=100000";
    let mut follow = bench.start(&format!("{job} --state state --follow --json"));
    follow.wait_for("\"event\":\"step\"");
    rack.signal("KILL");
    let (code, _, err) = follow.finish();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("CompNode `rack` vanished after step"), "{err}");
    // As whoever reads it reaches the broker, which may be on another machine.
    assert!(err.contains("`fusionllm resume 1 --state state` "), "{err}");
    std::fs::copy(bench.path("state/operate.ticket"), bench.path("op.ticket")).unwrap();
    let listed = bench.succeed("status --ticket-file op.ticket");
    assert!(listed.contains("`fusionllm resume 1 --ticket-file op.ticket` "), "{listed}");
    let status = status(&bench);
    assert_eq!(status["compnodes"].as_array().unwrap().len(), 1);
    assert_eq!(status["compnodes"][0]["job"], Value::Null, "the other one is free again");
}

#[test]
fn bad_data_on_the_owners_machine_is_the_jobs_fault() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let _node = join(&bench, &ticket, "office");
    let output = bench.run("submit job.toml --state state --follow --set data.path=nowhere.txt");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("nowhere.txt"), "{}", text(&output.stderr));
    let output = bench.run("submit job.toml --state state --set placement.compnodes=999");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("999 CompNodes but only"), "{}", text(&output.stderr));
}

#[test]
fn a_second_broker_on_the_same_state_or_port_is_refused() {
    let bench = Bench::new();
    let (_broker, ticket) = broker(&bench);
    let output = bench.run("broker --bind 127.0.0.1:0 --state state");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("in use by another broker"), "{}", text(&output.stderr));
    let ticket: fusionllm::transport::Ticket = ticket.parse().unwrap();
    let output = bench.run(&format!("broker --bind {} --state other", ticket.broker.addrs[0]));
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("is in use by another process"), "{}", text(&output.stderr));
}
