//! Networks come and go: commands and their exit codes, scenarios, and nothing left behind, however one ends.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Net, is_alive, kill, machine, pid_in, wait_until};
use rustix::process::Signal;
use wan_emu::control;
use wan_emu::measure::round_trips;

const TWO: &str = r#"
    [[node]]
    name = "broker"
    [[node]]
    name = "gpu"
    [[link]]
    from = "*"
    to = "*"
    preset = "100mbps-50ms"
"#;

/// Says its number and stays.
fn linger(file: &str) -> String {
    format!("echo $$ > {file}; exec sleep 60")
}

#[test]
fn commands_end_with_their_own_code_and_leave_nothing() {
    let Some(_machine) = machine() else { return };
    let net = Net::new("codes", TWO);
    let file = net.file.to_str().unwrap();
    let run = |words: &[&str]| net.code(&[&["run", file], words].concat());
    assert_eq!(run(&["--", "true"]), 0);
    assert_eq!(run(&["--", "sh", "-c", "exit 7"]), 7);
    assert_eq!(run(&["--node", "gpu", "--", "sh", "-c", "test $WAN_EMU_ADDR = 10.77.0.2"]), 0);
    assert_eq!(run(&["--node", "nobody", "--", "true"]), 2);
    assert_eq!(run(&["--", "/no/such/program"]), 1);
    // The kernel kills the command, not this program.
    assert_eq!(run(&["--node", "gpu", "--", "sh", "-c", "kill -9 $$"]), 137);
    net.assert_gone();
    assert_eq!(net.code(&["up", "/no/such/file"]), 2);
    fs::write(&net.file, TWO.replace("preset", "present")).unwrap();
    let output = net.wan_emu(&["up", file]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("unknown field `present`"), "{output:?}");
}

#[test]
fn a_network_in_the_background_serves_until_it_is_taken_down() {
    let Some(_machine) = machine() else { return };
    let net = Net::up("background", TWO);
    let output = net.wan_emu(&["exec", "gpu", "--", "sh", "-c", "echo $WAN_EMU_NODE at $WAN_EMU_ADDR; exit 5"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(5), b"gpu at 10.77.0.2\n".as_slice()));
    assert_eq!(net.code(&["exec", "nobody", "--", "true"]), 2);
    assert_eq!(net.code(&["up", net.file.to_str().unwrap()]), 1, "the name is taken");
    assert_eq!(control::status(&net.name).unwrap().links.len(), 2);
    assert!(String::from_utf8_lossy(&net.wan_emu(&["status"]).stdout).contains("10.77.0.2"));
    assert_eq!(net.code(&["down"]), 0);
    net.assert_gone();
    assert_eq!(net.code(&["down"]), 0);
    assert_eq!(net.code(&["status"]), 2);
}

#[test]
fn a_scenario_plays_its_steps() {
    let Some(_machine) = machine() else { return };
    let steps = r#"
        [[node]]
        name = "third"
        run = "sleep 60"
        [[step]]
        at_s = 0.3
        link = { from = "gpu", to = "broker", cut = true }
        [[step]]
        at_s = 0.6
        kill = { node = "third" }
        [[step]]
        at_s = 0.9
        run = { node = "gpu", command = "echo $WAN_EMU_ADDR_BROKER" }
    "#;
    let net = Net::new("steps", &format!("{TWO}{steps}"));
    let logs = net.directory.join("logs");
    let words = ["run", net.file.to_str().unwrap(), "--logs", logs.to_str().unwrap()];
    let mut run = net.command(&words).spawn().unwrap();
    wait_until("the link is cut", || {
        let status = control::status(&net.name).ok();
        status.is_some_and(|status| status.links.iter().filter(|link| link.cut).count() == 2)
    });
    // Without a command of its own it ends when nothing runs any more.
    assert_eq!(run.wait().unwrap().code(), Some(0));
    assert_eq!(fs::read_to_string(logs.join("gpu.log")).unwrap(), "10.77.0.1\n");
    net.assert_gone();
}

#[test]
fn a_node_that_fails_and_a_run_that_lasts_too_long_are_told() {
    let Some(_machine) = machine() else { return };
    let net = Net::new("failing", &format!("{TWO}\n[[node]]\nname = \"bad\"\nrun = \"exit 3\""));
    let output = net.wan_emu(&["run", net.file.to_str().unwrap(), "--", "sleep", "0.5"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the command of `bad` ended with exit status: 3"));
    fs::write(&net.file, format!("duration_s = 0.5\n{TWO}")).unwrap();
    let start = Instant::now();
    assert_eq!(net.code(&["run", net.file.to_str().unwrap(), "--", "sleep", "60"]), 1);
    assert_eq!(net.code(&["run", net.file.to_str().unwrap()]), 0);
    assert!(start.elapsed() < Duration::from_secs(10));
    net.assert_gone();
}

#[test]
fn a_run_that_gets_a_signal_takes_everything_with_it() {
    let Some(_machine) = machine() else { return };
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let net = Net::new("signal", TWO);
        let [inside, outside] = ["inside", "outside"].map(|name| net.directory.join(name));
        // One process on a node that left its group, one that CMD started outside of all.
        let words = format!(
            "setsid wan-emu-exec -- sh -c '{}' & ({}) & wait",
            linger(inside.to_str().unwrap()),
            linger(outside.to_str().unwrap())
        )
        .replace("wan-emu-exec", &format!("{} exec gpu --net {}", env!("CARGO_BIN_EXE_wan-emu"), net.name));
        let mut run = net
            .command(&["run", net.file.to_str().unwrap(), "--", "sh", "-c", &words])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pids = [pid_in(&inside), pid_in(&outside)];
        assert!(pids.into_iter().all(is_alive));
        kill(net.pid(), signal);
        assert_eq!(run.wait().unwrap().code(), Some(1));
        assert!(!is_alive(pids[0]) && !is_alive(pids[1]), "{pids:?}");
        net.assert_gone();
    }
}

#[test]
fn a_background_network_that_gets_a_signal_takes_its_processes_with_it() {
    let Some(_machine) = machine() else { return };
    let net = Net::up("term", TWO);
    let inside = net.directory.join("inside");
    let mut exec = net.command(&["exec", "gpu", "--", "sh", "-c", &linger(inside.to_str().unwrap())]).spawn().unwrap();
    let pid = pid_in(&inside);
    kill(net.pid(), Signal::TERM);
    net.assert_gone();
    assert!(!is_alive(pid));
    exec.wait().unwrap();
}

#[test]
fn what_a_killed_network_left_is_cleaned_up() {
    let Some(_machine) = machine() else { return };
    for again in ["down", "up"] {
        let net = Net::up("killed", TWO);
        let inside = net.directory.join("inside");
        let mut exec =
            net.command(&["exec", "gpu", "--", "sh", "-c", &linger(inside.to_str().unwrap())]).spawn().unwrap();
        let pid = pid_in(&inside);
        let killed = net.pid();
        kill(killed, Signal::KILL);
        wait_until("it is dead", || !is_alive(killed));
        assert_eq!(wan_emu::netns::existing(&net.name).len(), 2);
        assert!(is_alive(pid));
        let words = [again, net.file.to_str().unwrap()];
        assert_eq!(net.code(if again == "up" { &words } else { &words[..1] }), 0);
        assert!(!is_alive(pid));
        exec.wait().unwrap();
        if again == "up" {
            assert_eq!(net.code(&["exec", "gpu", "--", "true"]), 0);
            assert_eq!(net.code(&["down"]), 0);
        }
        net.assert_gone();
    }
}

#[test]
fn networks_of_the_same_addresses_do_not_meet() {
    let Some(_machine) = machine() else { return };
    let (one, two) = (Net::up("one", TWO), Net::up("two", &TWO.replace("100mbps-50ms", "1gbps-2ms")));
    let trip = |net: &Net| {
        let times = round_trips(&net.end("broker"), &net.end("gpu"), 5).unwrap();
        times[2].as_millis()
    };
    assert!(trip(&one) >= 49);
    assert!(trip(&two) < 10);
    assert_eq!(one.code(&["down"]), 0);
    assert!(trip(&two) < 10);
}

#[test]
fn the_planners_cluster_file_of_24_devices_is_a_network() {
    let Some(_machine) = machine() else { return };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/clusters/three-sites.toml");
    let net = Net::up("sites", &fs::read_to_string(file).unwrap());
    let times = round_trips(&net.end("tokyo-rtx3090-7"), &net.end("paris-t4-0"), 5).unwrap();
    assert!((225..=250).contains(&times[2].as_millis()), "{times:?}");
    assert_eq!(control::status(&net.name).unwrap().nodes.len(), 24);
    assert_eq!(net.code(&["down"]), 0);
    net.assert_gone();
}
