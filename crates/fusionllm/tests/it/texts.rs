//! What the commands say to bad input, held against stored texts.
//!
//! After a text has been changed on purpose, `INSTA_UPDATE=always cargo test --release -p fusionllm --test it texts`
//! stores the new ones; read the difference as somebody would who has never seen the source.

use std::process::Stdio;

use crate::process::{Bench, Running, text};

/// Lines for the shell in a folder with a small job, and what came of each.
struct Transcript {
    bench: Bench,
    text: String,
}

impl Transcript {
    fn new() -> Self {
        Self { bench: Bench::new(), text: String::new() }
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.bench.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// A file that is its owner's alone, as a secret must be.
    fn write_private(&self, name: &str, bytes: impl AsRef<[u8]>) {
        self.write(name, bytes);
        std::fs::set_permissions(self.bench.path(name), permissions(0o600)).unwrap();
    }

    /// The line and what came of it; no run directory may be left.
    fn says(&mut self, line: &str, code: i32) {
        let output = self.bench.shell(line).stdin(Stdio::null()).output().unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        let err = self.redacted(&err);
        assert_eq!(output.status.code(), Some(code), "{line}\n{out}\n{err}");
        assert!(err.starts_with("error: "), "{line}\n{out}\n{err}");
        for word in ["panicked", "backtrace", "internal error", "Some(", "Err(", "unwrap"] {
            assert!(!err.contains(word), "{line}\n{err}");
        }
        assert!(!self.bench.path("run").exists(), "{line} left a run directory");
        self.text.push_str(&format!("$ {line}\n{}{err}\n", self.redacted(&out)));
    }

    /// Bad input: one line, exit code 2.
    fn refuses(&mut self, line: &str) {
        self.says(line, 2);
        let lines = self.text.trim_end().rsplit("$ ").next().unwrap().lines().count();
        assert_eq!(lines, 2, "more than a line:\n{}", self.text);
    }

    /// What differs from run to run is replaced by what it is.
    fn redacted(&self, text: &str) -> String {
        let folder = self.bench.path("");
        text.replace(folder.to_str().unwrap(), "[FOLDER]/")
            .split_inclusive([' ', '\n', ',', ';', ':', '`', ')'])
            .map(|word| {
                let bare = word.trim_end_matches([' ', '\n', ',', ';', ':', '`', ')']);
                let rest = &word[bare.len()..];
                let is_peer = bare.len() == 10
                    && bare.chars().all(|c| c.is_ascii_hexdigit())
                    && text.contains(&format!("peer {bare}"));
                // Those that the system chose; the numbers of the cases are others.
                let is_port = bare.parse::<u32>().is_ok_and(|n| (32768..=65535).contains(&n));
                if is_peer {
                    format!("[PEER]{rest}")
                } else if is_port {
                    format!("[PORT]{rest}")
                } else {
                    word.to_owned()
                }
            })
            .collect()
    }
}

#[test]
fn job_files() {
    let mut t = Transcript::new();
    t.write("empty.toml", "");
    t.write("broken.toml", "name = \"a\"\n[model\n");
    t.write("unclosed.toml", "name = \"a\n");
    t.write("twice.toml", "name = \"a\"\nname = \"b\"\n");
    t.write("latin.toml", b"name = \"t\xe4glich\"\n");
    t.write("binary.toml", b"\x7fELF\x02\x01\x00");
    t.write("bom.toml", "\u{feff}[model]\nname = \"gpt9\"\n[data]\npath = \"text.txt\"\n");
    t.write("json.toml", "{\"model\": {\"name\": \"gpt2\"}}\n");
    t.write("scalar.toml", "model = 3\n");
    t.write("nothing-to-train.toml", "[data]\npath = \"text.txt\"\n");
    t.write("long.toml", "#".repeat((1 << 20) + 1));
    make_pipe(&t, "pipe");
    t.write("nothing-to-read.toml", "[model]\nname = \"gpt2\"\n");
    for file in [
        "none.toml",
        ".",
        "empty.toml",
        "broken.toml",
        "unclosed.toml",
        "twice.toml",
        "latin.toml",
        "binary.toml",
        "bom.toml",
        "json.toml",
        "scalar.toml",
        "nothing-to-train.toml",
        "nothing-to-read.toml",
        "job.toml/x",
        "/dev/zero",
        "pipe",
        "long.toml",
    ] {
        t.refuses(&format!("fusionllm train {file} --out run"));
    }
    if !is_root() {
        t.write("secret.toml", "");
        std::fs::set_permissions(t.bench.path("secret.toml"), permissions(0o000)).unwrap();
        t.refuses("fusionllm train secret.toml --out run");
        t.text.truncate(t.text.find("$ fusionllm train secret.toml").unwrap());
    }
    insta::assert_snapshot!(t.text);
}

/// What `--set` may be given that cannot be right.
const SETS: &[&str] = &[
    "nonsense",
    "=3",
    "train.=3",
    ".steps=3",
    "steps=3",
    "a.b.c=1",
    "train=3",
    "trian.steps=3",
    "train.step=3",
    "train.learning_rate=3",
    "train.seq_len=3",
    "train.steps=",
    "train.steps=many",
    "train.steps=-1",
    "train.steps=0",
    "train.steps=1.5",
    "train.steps=1e3",
    "train.steps=99999999999999999999",
    "train.steps=9000000000000000000",
    "train.steps=2026-01-01",
    "train.steps=[1]",
    "train.steps={a=1}",
    "train.steps=true",
    "train.batch=5",
    "train.batch=4294967296",
    "train.micro_batches=1000000",
    "train.eval_batches=1000000",
    "train.warmup=100",
    "train.lr=nan",
    "train.lr=1e39",
    "train.lr=0",
    "train.lr=fast",
    "train.betas=0.9",
    "train.betas=[0.9]",
    "train.betas=[0.9,1]",
    "train.optimizer=lion",
    "train.schedule=step",
    "train.precision=fp8",
    "data.path=",
    "data.path=[]",
    "data.path=[1,2]",
    "data.format=csv",
    "data.tokenizer=",
    "data.seq_len=1",
    "data.seq_len=1000000000",
    "data.private=yes",
    "data.owner=",
    "data.eval_fraction=1",
    "model.name=gpt9",
    "model.name=",
    "model.path=elsewhere",
    "model.n_layer=100000",
    "model.n_head=3",
    "model.n_head=0",
    "model.vocab_size=100",
    "model.n_embd=-16",
    "name=",
    "name=..",
    "name=a/b",
    "placement.strategy=fastest",
    "placement.pipeline=2f2b",
    "placement.compnodes=0",
    "placement.compnodes=500",
    "placement.compnodes=4000000000",
    "placement.stages=2",
    "placement.stages=[{compnode=0}]",
    "placement.stages=[{compnode=9,last_op=\"loss\"}]",
    "placement.stages=[{compnode=0,last_op=\"nowhere\"}]",
    "compression.policy=zip",
    "compression.ratio=0.5",
    "compression.ratio=inf",
    "compression.ratio=1e30",
    "compression.activations=int5",
    "compression.activations=topk:2:bf16",
    "checkpoint.every=-1",
    "checkpoint.keep=all",
];

#[test]
fn job_keys() {
    let mut t = Transcript::new();
    for set in SETS {
        t.refuses(&format!("fusionllm train job.toml --out run --set '{set}'"));
    }
    t.refuses("fusionllm train job.toml --out run --set name=\"$(printf 'a%.0s' $(seq 300))\"");
    t.refuses("fusionllm train job.toml --out run --set name=\"$(printf 'a\\033[2Jb')\"");
    insta::assert_snapshot!(t.text);
}

#[test]
fn data_and_tokenizers() {
    let mut t = Transcript::new();
    t.write("empty.txt", "");
    t.write("short.txt", "too short");
    t.write("latin.txt", b"t\xe4glich".repeat(1000));
    std::fs::create_dir(t.bench.path("bare")).unwrap();
    t.write("broken.json", "{\n  \"version\": \"1.0\",\n");
    t.write("other.json", "{\"a\": 1}\n");
    for set in [
        "data.path=none.txt",
        "data.path=empty.txt",
        "data.path=short.txt",
        "data.path=latin.txt",
        "data.path=bare",
        "data.tokenizer=none.json",
        "data.tokenizer=bare",
        "data.tokenizer=broken.json",
        "data.tokenizer=other.json",
        "data.tokenizer=text.txt",
    ] {
        t.refuses(&format!("fusionllm train job.toml --out run --set {set}"));
    }
    insta::assert_snapshot!(t.text);
}

#[test]
fn models() {
    let mut t = Transcript::new();
    let job = std::fs::read_to_string(t.bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    assert!(job.contains(model));
    let config = "{\"model_type\": \"gpt2\", \"vocab_size\": 256, \"n_positions\": 16, \"n_embd\": 16, \"n_layer\": 1, \"n_head\": 2}";
    t.bench.succeed("plan job.toml --write-graph graph.json");
    let graph = std::fs::read_to_string(t.bench.path("graph.json")).unwrap();
    t.write("folder/readme", "");
    t.write("broken/config.json", "{\n  \"n_layer\": 1,\n  oops\n}");
    t.write("empty/config.json", "");
    t.write("other/config.json", config.replace("gpt2", "llama"));
    t.write("less/config.json", config.replace(", \"n_head\": 2", ""));
    t.write("text/config.json", config.replace("\"n_layer\": 1", "\"n_layer\": \"one\""));
    t.write("minus/config.json", config.replace("\"n_layer\": 1", "\"n_layer\": -1"));
    t.write("deep/config.json", config.replace("\"n_layer\": 1", "\"n_layer\": 1000000"));
    t.write("narrow/config.json", config.replace("\"n_head\": 2", "\"n_head\": 3"));
    t.write("garbage/config.json", config);
    t.write("garbage/model.safetensors", "garbage");
    t.write("empty.json", "");
    t.write("broken.json", &graph[..30]);
    t.write("list.json", "[]");
    t.write("version.json", graph.replacen("\"version\": 1", "\"version\": 99", 1));
    t.write("heads.json", graph.replacen("\"heads\": 2", "\"heads\": 3", 1));
    t.write("unknown.json", graph.replacen("\"wte\"", "\"wte2\"", 1));
    for path in [
        "none",
        "folder",
        "broken",
        "empty",
        "other",
        "less",
        "text",
        "minus",
        "deep",
        "narrow",
        "garbage",
        "empty.json",
        "broken.json",
        "list.json",
        "version.json",
        "heads.json",
        "unknown.json",
        "text.txt",
    ] {
        t.write("by-path.toml", job.replace(model, &format!("path = \"{path}\"\n")));
        t.refuses(&format!("fusionllm train by-path.toml --out run # model.path = \"{path}\""));
    }
    t.write("image.toml", job.replace(model, "name = \"resnet101\"\n"));
    t.refuses("fusionllm train image.toml --out run");
    t.refuses("fusionllm generate garbage --prompt a");
    t.refuses("fusionllm generate other --prompt a");
    insta::assert_snapshot!(t.text);
}

#[test]
fn cluster_files() {
    let mut t = Transcript::new();
    let device = "[[device]]\nname = \"gpu\"\nflop_per_s = 1e12\n";
    let link = "[[link]]\nfrom = \"*\"\nto = \"*\"\nlatency_ms = 10\nmbit_per_s = 8\n";
    t.write("empty.toml", "");
    t.write("broken.toml", "[[device]]\nname = \"gpu\"\nflop_per_s 1e12\n");
    t.write("no-name.toml", "[[device]]\nflop_per_s = 1e12\n");
    t.write("no-link.toml", format!("{device}count = 2\n"));
    t.write("no-device.toml", link);
    t.write("colour.toml", format!("{device}colour = \"red\"\n"));
    t.write("text.toml", device.replace("1e12", "\"fast\""));
    t.write("minus.toml", device.replace("1e12", "-1"));
    t.write("nan.toml", format!("{device}memory_gb = nan\n"));
    t.write("many.toml", format!("{device}count = 4000000000\n"));
    t.write("none-of-it.toml", format!("{device}count = 0\n"));
    t.write("twice.toml", format!("{device}{device}{link}"));
    t.write("stranger.toml", format!("{device}{}", link.replace("to = \"*\"", "to = \"mars\"")));
    t.write("still.toml", format!("{device}count = 2\n{}", link.replace("mbit_per_s = 8", "mbit_per_s = 0")));
    t.write("good.toml", format!("{device}count = 2\n{link}"));
    for file in [
        "none",
        ".",
        "empty.toml",
        "broken.toml",
        "no-name.toml",
        "no-link.toml",
        "no-device.toml",
        "colour.toml",
        "text.toml",
        "minus.toml",
        "nan.toml",
        "many.toml",
        "none-of-it.toml",
        "twice.toml",
        "stranger.toml",
        "still.toml",
    ] {
        t.refuses(&format!("fusionllm plan job.toml --cluster {file}"));
    }
    t.refuses("fusionllm plan job.toml --cluster good.toml --compnodes 3");
    t.refuses("fusionllm plan job.toml --cluster good.toml --ratio nan");
    t.refuses("fusionllm plan job.toml --cluster good.toml --ratio -1");
    t.refuses("fusionllm plan job.toml --cluster good.toml --ratio 1e30");
    t.refuses("fusionllm plan job.toml --cluster good.toml --compression zip");
    t.refuses("fusionllm plan job.toml --cluster good.toml --set data.owner=office");
    t.refuses("fusionllm plan job.toml --svg plan.svg");
    t.refuses("fusionllm plan job.toml --compare");
    t.refuses("fusionllm plan job.toml job.toml --cluster good.toml");
    t.refuses("fusionllm plan job.toml --cluster good.toml --svg none/plan.svg");
    t.refuses("fusionllm plan job.toml --cluster good.toml --trace .");
    insta::assert_snapshot!(t.text);
}

#[test]
fn checkpoints() {
    let mut t = Transcript::new();
    t.bench.succeed("train job.toml --out done --compnodes 1");
    let manifest = std::fs::read_to_string(t.bench.path("done/checkpoints/step-8/manifest.json")).unwrap();
    std::fs::create_dir_all(t.bench.path("bare/checkpoints")).unwrap();
    t.write("cut/manifest.json", &manifest[..30]);
    t.write("empty/manifest.json", "");
    t.write("other/manifest.json", "{\"format\": \"pt\"}");
    t.write("newer/manifest.json", manifest.replacen("\"version\": 2", "\"version\": 99", 1));
    t.write("lost/manifest.json", &manifest);
    t.write("step-3/readme", "");
    t.write("unlisted/checkpoints/step-4/readme", "");
    for folder in
        ["none", "text.txt", "bare", "cut", "empty", "other", "newer", "lost", "step-3", "unlisted", "done/job.json"]
    {
        t.refuses(&format!("fusionllm train --resume {folder}"));
    }
    t.refuses("fusionllm train --resume done");
    t.refuses("fusionllm train --resume done --set train.steps=9 --set model.n_layer=2");
    t.refuses("fusionllm train --resume done --set train.steps=9 --set data.seq_len=8");
    t.refuses("fusionllm train job.toml --out done");
    t.refuses("fusionllm train job.toml --out text.txt");
    t.refuses("fusionllm train job.toml --out text.txt/below");
    t.write("held/fusionllm.lock", "mine");
    t.refuses("fusionllm train job.toml --out held");
    // Before the data is read, which may take long.
    t.refuses("fusionllm train job.toml --out held --set data.path=none.txt");
    t.refuses("fusionllm train job.toml --out x --set checkpoint.to=held");
    t.refuses("fusionllm train job.toml --out x --set checkpoint.to=text.txt");
    std::fs::create_dir(t.bench.path("texts")).unwrap();
    std::fs::copy(t.bench.path("text.txt"), t.bench.path("texts/a.txt")).unwrap();
    t.refuses("fusionllm train job.toml --out x --set data.path=texts --set checkpoint.to=texts");
    t.bench.succeed("export done hf");
    let job = std::fs::read_to_string(t.bench.path("job.toml")).unwrap();
    let model = "name = \"gpt2\"\nn_layer = 1\nn_embd = 16\nn_head = 2\n";
    t.write("tune.toml", job.replace(model, "path = \"hf\"\n"));
    t.refuses("fusionllm train tune.toml --out x --set checkpoint.to=hf/../hf");
    t.refuses("fusionllm export done /dev/null");
    t.refuses("fusionllm export done done");
    t.refuses("fusionllm export none hf");
    t.refuses("fusionllm generate none --prompt a");
    t.refuses("fusionllm generate done --prompt ''");
    t.refuses("fusionllm generate done --prompt a --temperature nan");
    t.refuses("fusionllm generate done --prompt a --temperature -1");
    t.refuses("fusionllm generate done --prompt a --device quantum");
    insta::assert_snapshot!(t.text);
}

#[test]
fn brokers_that_are_not_there() {
    let mut t = Transcript::new();
    t.write_private("garbled/operate.ticket", "hello\n");
    t.write_private("blank/operate.ticket", "\n");
    t.write("open/operate.ticket", "hello\n");
    t.write("earlier/ticket", "hello\n");
    t.write("a-file", "");
    make_pipe(&t, "pipe");
    for line in [
        "fusionllm status",
        "fusionllm status --state none",
        "fusionllm status --state a-file",
        "fusionllm status --state garbled",
        "fusionllm status --state blank",
        "fusionllm status --state open",
        "fusionllm status --state earlier",
        "fusionllm status --ticket-file none.ticket",
        "fusionllm join --ticket-file none.ticket",
        "fusionllm join --ticket-file pipe",
        "fusionllm status --ticket-file /dev/zero",
        "fusionllm join - < /dev/zero",
        "fusionllm ticket new --role join --expires 99999999999999d",
        "fusionllm ticket new --role join --expires soon",
        "fusionllm join hello --data none",
        "fusionllm status --ticket ''",
        "fusionllm status --ticket hello",
        "fusionllm status --ticket fusionllmabc",
        "fusionllm status --ticket fusionllm!",
        "FUSIONLLM_TICKET= fusionllm status",
        "FUSIONLLM_TICKET=' ' fusionllm join",
        "FUSIONLLM_TICKET=hello fusionllm status",
        "fusionllm join",
        "fusionllm join hello",
        "XDG_STATE_HOME=here fusionllm status",
        "XDG_STATE_HOME= HOME= fusionllm status",
        "FUSIONLLM_LOG=debgu fusionllm status",
        "FUSIONLLM_LOG==,= fusionllm status",
        "FUSIONLLM_LOG=fusionllm=loud fusionllm status",
        "FUSIONLLM_LOG=\"$(printf '\\377')\" fusionllm status",
        "fusionllm submit none.toml",
        "fusionllm submit job.toml",
        "fusionllm inventory --refresh --watch",
    ] {
        t.refuses(line);
    }
    insta::assert_snapshot!(t.text);
}

#[test]
fn brokers_that_refuse() {
    let mut t = Transcript::new();
    let mut broker: Running = t.bench.start("broker --bind 127.0.0.1:0 --state state --runs runs --json --show-ticket");
    broker.wait_for("ticket");
    t.write("a-file", "");
    t.write("runs/job", "");
    t.write("empty-secret/secret", "");
    t.write("open-key/key", "0".repeat(64));
    std::fs::set_permissions(t.bench.path("open-key"), permissions(0o700)).unwrap();
    std::fs::set_permissions(t.bench.path("open-key/key"), permissions(0o644)).unwrap();
    for line in [
        "fusionllm stop 99 --state state",
        "fusionllm resume 99 --state state",
        "fusionllm submit job.toml --state state --set data.path=",
        "fusionllm submit job.toml --state state --set model.n_layer=100000",
        "fusionllm submit job.toml --state state --set placement.compnodes=500",
        "fusionllm broker --bind 127.0.0.1:0 --state state",
        "fusionllm submit job.toml --state state --set checkpoint.to=/elsewhere",
        "fusionllm ticket new --role join --name join --state state",
        "fusionllm ticket new --role join --name a/b --state state",
        "fusionllm ticket revoke nobody --state state",
        "fusionllm broker --bind 203.0.113.9:7710 --state other",
    ] {
        t.refuses(line);
    }
    for line in [
        "fusionllm broker --bind 127.0.0.1:0 --state a-file",
        "fusionllm broker --bind 127.0.0.1:0 --state a-file/below",
        "fusionllm broker --bind 127.0.0.1:0 --state other --runs a-file",
        "fusionllm broker --bind 127.0.0.1:0 --state other --checkpoints a-file",
        "fusionllm broker --bind 127.0.0.1:0 --state other --models a-file",
        "fusionllm broker --bind 127.0.0.1:0 --state open-key",
        "fusionllm join --ticket-file state/join.ticket --state a-file",
        "fusionllm join --ticket-file state/join.ticket --data /dev/zero",
        "fusionllm join --ticket-file state/join.ticket --name=-x",
        "fusionllm join --ticket-file state/join.ticket --name \"$(printf 'a\\nb')\"",
        "fusionllm join --ticket-file state/join.ticket --device quantum",
        "fusionllm ticket new --role join --name=-x --state state",
        "fusionllm ticket new --role join --out none/x --state state",
        "fusionllm ticket new --role join --out a-file --state state",
        "fusionllm submit job.toml --state state --set name=-x",
        "fusionllm submit job.toml --state state --set checkpoint.to=runs/job",
    ] {
        t.refuses(line);
    }
    let mut ticket: fusionllm::transport::Ticket =
        std::fs::read_to_string(t.bench.path("state/operate.ticket")).unwrap().trim().parse().unwrap();
    ticket.secret = fusionllm::transport::Secret::generate();
    t.write_private("wrong-secret/operate.ticket", ticket.to_string());
    t.says("fusionllm status --state wrong-secret", 2);
    broker.signal("KILL");
    broker.finish();
    t.says("fusionllm status --state state", 1);
    insta::assert_snapshot!(t.text);
}

/// What clap says takes several lines, since it shows the usage.
#[test]
fn usage() {
    let mut t = Transcript::new();
    for line in [
        "fusionllm trian job.toml",
        "fusionllm train",
        "fusionllm train job.toml --resume done",
        "fusionllm train job.toml --step 3 --out run",
        "fusionllm train job.toml --stpes 3",
        "fusionllm train job.toml --compnodes 0",
        "fusionllm train job.toml --compnodes many",
        "fusionllm train job.toml --compnodes 99999999999",
        "fusionllm stop",
        "fusionllm stop one",
        "fusionllm stop -1",
        "fusionllm resume 99999999999999999999",
        "fusionllm broker --bind here",
        "fusionllm broker --bind 127.0.0.1",
        "fusionllm join x --threads 0",
        "fusionllm join x --threads 100000",
        "fusionllm join x --memory-gb 1e30",
        "fusionllm join x --memory-gb -1",
        "fusionllm join x --memory-gb nan",
        "fusionllm join x --advertise 0.0.0.0:7711",
        "fusionllm broker --advertise 203.0.113.9:0",
        "fusionllm broker --bind 224.0.0.1:7710",
        "fusionllm generate done --prompt a --tokens 0",
        "fusionllm generate done",
        "fusionllm inventory --toml --json",
    ] {
        t.says(line, 2);
    }
    insta::assert_snapshot!(t.text);
}

/// A pipe that nobody writes to.
fn make_pipe(t: &Transcript, name: &str) {
    assert!(std::process::Command::new("mkfifo").arg(t.bench.path(name)).status().unwrap().success());
}

fn is_root() -> bool {
    let output = std::process::Command::new("id").arg("-u").output().unwrap();
    text(&output.stdout).trim() == "0"
}

fn permissions(mode: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}
