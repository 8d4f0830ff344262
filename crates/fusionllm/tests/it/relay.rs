//! CompNodes that do not reach each other train together over the broker's relay, or by the way that they find by it.

use serde_json::Value;

use crate::machines::{Machines, Nat};
use crate::process::{Bench, Running, losses, text, wait_until};

/// The broker's machine and those of two CompNodes.
const MACHINES: usize = 3;

/// Broker and CompNodes on machines of their own.
struct Lab {
    bench: Bench,
    machines: Machines,
    broker: Option<Running>,
    nodes: Vec<Running>,
}

impl Lab {
    fn new(machines: Machines, broker: &str) -> Self {
        let mut lab = Self { bench: Bench::new(), machines, broker: None, nodes: Vec::new() };
        lab.start(broker);
        for machine in 1..MACHINES {
            let line = format!(
                "join --ticket-file state/join.ticket --name gpu-{machine} --device cpu --data . --state s{machine}"
            );
            let node = lab.spawn(machine, &line);
            lab.nodes.push(node);
        }
        lab.wait("all have joined", |status| status["compnodes"].as_array().is_some_and(|c| c.len() == MACHINES - 1));
        lab
    }

    fn start(&mut self, broker: &str) {
        let mut broker =
            self.spawn(0, &format!("broker --bind 0.0.0.0:7710 --state state --runs runs --json {broker}"));
        broker.wait_for("ticket");
        self.broker = Some(broker);
    }

    fn spawn(&self, machine: usize, line: &str) -> Running {
        Running::spawn(self.bench.shell_behind(&self.machines.enter(machine), &format!("exec fusionllm {line}")))
    }

    /// Standard output of a command on the broker's machine.
    fn succeed(&self, line: &str) -> String {
        let mut command =
            self.bench.shell_behind(&self.machines.enter(0), &format!("exec fusionllm {line} --state state"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{line}: {}\n{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.succeed(&format!("{line} --json"))).unwrap()
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Value) -> bool) {
        wait_until(|| is_so(&self.json("status")), what);
    }

    /// Trains, and holds the losses against those of a run on one machine.
    fn trains_as_train_does(&self) {
        let out = self.succeed("submit job.toml --follow");
        assert!(out.contains("step 8/8"), "{out}");
        let status = self.json("status");
        let run = status["jobs"].as_array().unwrap().last().unwrap()["run_dir"].as_str().unwrap().to_owned();
        let out = format!("here-{}", status["jobs"].as_array().unwrap().len());
        self.bench.succeed(&format!("train job.toml --out {out} --compnodes 2"));
        assert_eq!(losses(std::path::Path::new(&run)), losses(&self.bench.path(&out)));
    }
}

#[test]
fn compnodes_that_reach_only_the_broker_train_over_its_relay() {
    let machines = match Machines::apart(MACHINES) {
        Ok(machines) => machines,
        Err(reason) => return eprintln!("no machines that do not reach each other: {reason}"),
    };
    let mut lab = Lab::new(machines, "--relay");
    let inventory = lab.json("inventory");
    let links = inventory["links"].as_array().unwrap();
    assert!(links.len() == 2 && links.iter().all(|link| link["relayed"] == true), "{inventory}");
    assert!(lab.succeed("inventory").contains("over the broker's relay"));
    // Whichever has joined first is named first.
    let status = lab.succeed("status");
    assert!(
        ["gpu-1 - gpu-2", "gpu-2 - gpu-1"].iter().any(|pair| status.contains(&format!("over the relay: {pair}"))),
        "{status}"
    );
    lab.trains_as_train_does();

    // The relay goes with the broker, and what is relayed is dialled again when both are back.
    let broker = lab.broker.take().unwrap();
    broker.signal("KILL");
    broker.finish();
    lab.start("--relay");
    lab.wait("all are back", |status| status["compnodes"].as_array().is_some_and(|c| c.len() == MACHINES - 1));
    lab.trains_as_train_does();

    // A broker without one says what would help.
    let Lab { bench, machines, broker, nodes } = lab;
    drop((broker, nodes));
    drop(bench);
    let lab = Lab::new(machines, "");
    let inventory = lab.succeed("inventory");
    assert!(inventory.contains("unreachable") && inventory.contains("`fusionllm broker --relay`"), "{inventory}");
}

#[test]
fn compnodes_behind_routers_train_together() {
    for (nat, is_relayed) in [(Nat::Cone, false), (Nat::Symmetric, true)] {
        let machines = match Machines::behind_routers(MACHINES, nat) {
            Ok(machines) => machines,
            Err(reason) => return eprintln!("no machines behind routers: {reason}"),
        };
        let lab = Lab::new(machines, "--relay");
        let inventory = lab.json("inventory");
        let links = inventory["links"].as_array().unwrap();
        assert!(links.len() == 2 && links.iter().all(|link| link["relayed"] == is_relayed), "{nat:?}: {inventory}");
        lab.trains_as_train_does();
        // A direct way is found before long, which may be after these few steps.
        assert!(!is_relayed || lab.succeed("status").contains("over the relay"));
    }
}
