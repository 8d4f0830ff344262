//! Where the commands of the pages are run: a folder with a job, a broker, CompNodes, runs, each made when a command needs
//! it.

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::machines::Machines;
use crate::process::{Bench, LIMIT, Running, text};

/// CompNodes that a command finds which needs any.
const COMPNODES: usize = 2;
/// What makes a long example short. The numbers of its sets stand after those of the page, and so count.
const SHORT: &str = "--set train.steps=4 --set train.warmup=1 --set train.batch=4 --set train.eval_batches=1 \
                     --set checkpoint.every=2";
/// Steps of a job that is still running when it is stopped, and done soon after it goes on.
const STOPPABLE_STEPS: u32 = 400;

/// A step of which the job's runs have a checkpoint.
const CHECKPOINT: u32 = 4;

/// What is left out of a page's command since it takes minutes: the plan of the paper's experiment in full.
pub(super) const LEFT_OUT: [&str; 2] = [
    "examples/plan/gpt2-medium.toml examples/plan/gpt2-large.toml examples/plan/gpt2-xl.toml ",
    "--cluster examples/clusters/three-sites.toml --cluster examples/clusters/scattered.toml ",
];

/// What stands for the words in capitals.
const PLACEHOLDERS: [(&str, &str); 14] = [
    ("JOB.toml", "job.toml"),
    ("JOB", "job.toml"),
    ("CLUSTER.toml", "cluster.toml"),
    ("FILE", "cluster.toml"),
    ("RUN_DIR", "a-run"),
    ("RUN", "a-run"),
    ("CHECKPOINT", "a-run/checkpoints/step-4"),
    ("HF_DIR", "a-model"),
    ("NEW_DIR", "a-new-run"),
    ("DIR", "a-folder"),
    ("N", "2"),
    ("R", "10"),
    ("STRATEGY", "op-fence"),
    ("POLICY", "ada-topk"),
];

/// Whose conversations of two letters fit in a sequence of eight bytes.
const CHAT_TEMPLATE: &str =
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}";

pub(super) struct Site {
    bench: Bench,
    /// Several machines, the broker's first; nothing if all is on this one.
    machines: Option<Machines>,
    broker: Option<Running>,
    compnodes: Vec<Running>,
    /// The page's own way to join.
    join: String,
}

impl Site {
    /// A folder with what the pages speak of, and the cluster file of `docs/planning.md`.
    pub(super) fn new(machines: Option<Machines>, cluster: &str) -> Self {
        let bench = Bench::new();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        std::os::unix::fs::symlink(root.join("examples"), bench.path("examples")).unwrap();
        std::fs::create_dir(bench.path("texts")).unwrap();
        std::fs::copy(bench.path("text.txt"), bench.path("texts/a.txt")).unwrap();
        bench.write("cluster.toml", cluster);
        crate::images::make_cifar(&bench.path("cifar10"));
        Self {
            bench,
            machines,
            broker: None,
            compnodes: Vec::new(),
            join: "fusionllm join --ticket-file join.ticket --data .".to_owned(),
        }
    }

    /// Runs a command as a page has it. What it needs is made before.
    pub(super) fn run(&mut self, shown: &str) -> Result<(), String> {
        let mut line = shown.to_owned();
        for part in LEFT_OUT {
            line = line.replace(part, "");
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "fusionllm").ok_or("there is no `fusionllm` in it")?;
        let subcommand = (*words.get(at + 1).ok_or("it has no subcommand")?).to_owned();
        match subcommand.as_str() {
            "broker" => self.start_broker(&line),
            "join" => {
                // The data owner is any of them.
                if line.contains("--data") {
                    self.join = line.clone();
                }
                self.join(&line)
            }
            "ticket" => {
                self.need_broker()?;
                self.succeeds(&line)
            }
            "submit" | "status" | "inventory" => {
                self.need_compnodes()?;
                self.succeeds(&line)
            }
            "stop" | "resume" => {
                let job = self.need_job(subcommand == "resume")?;
                self.succeeds(&replace_word(&line, words.get(at + 2).ok_or("it names no job")?, &job.to_string()))
            }
            "drain" => self.drain(&line, words.get(at + 2).ok_or("it names no CompNode")?),
            "train" if line.contains("examples/") => {
                self.need_model(&line)?;
                self.succeeds(&format!("{line} {SHORT} {}{}", fitting(&line), self.need_chats(&line)))
            }
            "train" | "export" | "generate" => {
                self.need_run(line.contains("--resume"))?;
                self.need_model(&line)?;
                self.succeeds(&line)
            }
            "plan" => {
                self.need_model(&line)?;
                self.succeeds(&format!("{line} {}", fitting(&line)))
            }
            other => Err(format!("this test knows no way to run `fusionllm {other}`, teach it one")),
        }
    }

    /// The line with every placeholder filled in.
    fn filled(&self, line: &str) -> Result<String, String> {
        let mut line = replace_word(line, "/path/to/texts", &self.bench.path("texts").display().to_string());
        line = replace_word(&line, "/path/to/cifar10", &self.bench.path("cifar10").display().to_string());
        line = replace_word(&line, "/path/to/chats.jsonl", &self.bench.path("chats.jsonl").display().to_string());
        line = replace_word(&line, "/path/to/an-adapter", &self.bench.path("an-adapter").display().to_string());
        line = line.replace("--data /srv/texts", "--data .").replace("--data DIR", "--data .");
        line = replace_word(&line, "/path/to/model", &self.bench.path("a-model").display().to_string());
        let mut words = line.split_whitespace().skip_while(|word| *word != "--step");
        if let Some(step) = words.nth(1).map(|step| format!("--step {step}")) {
            line = line.replace(&step, &format!("--step {CHECKPOINT}"));
        }
        for (word, value) in PLACEHOLDERS {
            line = replace_word(&line, word, value);
        }
        let is_placeholder = |word: &str| {
            word.chars().any(|c| c.is_ascii_uppercase())
                && word.chars().all(|c| c.is_ascii_uppercase() || c == '_' || c == '-')
        };
        let open =
            line.split([' ', '=', '/', ',']).find(|word| is_placeholder(word) && !word.starts_with("FUSIONLLM_"));
        match open {
            Some(word) => Err(format!("this test has nothing to put for `{word}`, add it to PLACEHOLDERS")),
            None => Ok(line),
        }
    }

    /// A command on a machine, the broker's being the first.
    fn command(&self, machine: usize, line: &str) -> std::process::Command {
        let enter = self.machines.as_ref().map_or(Vec::new(), |machines| machines.enter(machine));
        let mut command = self.bench.shell_behind(&enter, line);
        command.env("XDG_STATE_HOME", self.bench.path(&format!("machine-{machine}"))).stdin(Stdio::null());
        command
    }

    fn output(&self, line: &str) -> Result<Output, String> {
        self.command(0, &self.filled(line)?).output().map_err(|e| e.to_string())
    }

    fn succeeds(&self, line: &str) -> Result<(), String> {
        let output = self.output(line)?;
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        if output.status.success() { Ok(()) } else { Err(format!("ended with {}\n{out}\n{err}", output.status)) }
    }

    /// Where all is on one machine, its ports may be taken, by another test's broker.
    fn with_free_port(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.iter().position(|word| *word == "--bind") {
            _ if self.machines.is_some() => line.to_owned(),
            Some(at) => words[..at]
                .iter()
                .chain(["--bind", "127.0.0.1:0"].iter())
                .chain(&words[at + 2..])
                .copied()
                .collect::<Vec<_>>()
                .join(" "),
            None => format!("{line} --bind 127.0.0.1:0"),
        }
    }

    /// A broker in the place of the one before.
    fn start_broker(&mut self, line: &str) -> Result<(), String> {
        self.end();
        let line = self.filled(&self.with_free_port(line))?;
        let mut broker = Running::spawn(self.command(0, &format!("exec {line}")));
        let mut seen = String::new();
        while !seen.contains("fusionllm join --ticket-file") {
            let Some(said) = broker.line() else {
                return Err(format!("nothing was said on how to join\n{seen}\n{}", broker.finish().2));
            };
            seen.push_str(&said);
        }
        // What a person copies to each machine.
        let made = self.bench.path("machine-0/fusionllm/join.ticket");
        std::fs::copy(&made, self.bench.path("join.ticket")).map_err(|e| format!("{}: {e}", made.display()))?;
        if line.contains("--advertise") {
            let outer = line.split_whitespace().skip_while(|w| *w != "--advertise").nth(1).unwrap_or_default();
            let ticket = std::fs::read_to_string(made).map_err(|e| e.to_string())?;
            let parsed: fusionllm::transport::Ticket = ticket.trim().parse().map_err(|e| format!("{e}"))?;
            if !parsed.broker.addrs.iter().any(|addr| addr.to_string() == outer) {
                return Err(format!("{outer} is not in the ticket: {:?}", parsed.broker.addrs));
            }
        }
        self.broker = Some(broker);
        Ok(())
    }

    /// Ends broker and CompNodes as an operator does, which must go well.
    fn end(&mut self) {
        if let Some(broker) = self.broker.take() {
            broker.signal("INT");
            let (code, out, err) = broker.finish();
            assert_eq!(code, Some(0), "the broker's end\n{out}\n{err}");
        }
        for compnode in self.compnodes.drain(..) {
            compnode.signal("INT");
            let (code, out, err) = compnode.finish();
            assert_eq!(code, Some(0), "a CompNode's end\n{out}\n{err}");
        }
    }

    fn need_broker(&mut self) -> Result<(), String> {
        if self.broker.is_none() { self.start_broker("fusionllm broker") } else { Ok(()) }
    }

    /// A further CompNode, on a machine of its own, which is there when this returns.
    fn join(&mut self, line: &str) -> Result<(), String> {
        self.need_broker()?;
        let line = self.filled(&self.with_free_port(line))?;
        let machine = 1 + self.compnodes.len() % COMPNODES;
        self.compnodes.push(Running::spawn(self.command(machine, &format!("exec {line}"))));
        let joined = self.compnodes.len();
        self.wait("all CompNodes have joined", |status| {
            status["compnodes"].as_array().is_some_and(|c| c.len() == joined)
        })?;
        Ok(())
    }

    fn need_compnodes(&mut self) -> Result<(), String> {
        self.need_broker()?;
        while self.compnodes.len() < COMPNODES {
            self.join(&self.join.clone())?;
        }
        Ok(())
    }

    /// One of the CompNodes leaves.
    fn drain(&mut self, line: &str, shown: &str) -> Result<(), String> {
        self.need_compnodes()?;
        let status = self.status()?;
        let name = status["compnodes"].as_array().and_then(|all| all.last()?["name"].as_str()).unwrap_or_default();
        self.succeeds(&replace_word(line, shown, name))?;
        let gone = self.compnodes.pop().ok_or("there is no CompNode")?;
        let (code, out, err) = gone.finish();
        if code == Some(0) { Ok(()) } else { Err(format!("it ended with {code:?}\n{out}\n{err}")) }
    }

    fn status(&self) -> Result<Value, String> {
        let output = self.output("fusionllm status --json")?;
        serde_json::from_slice(&output.stdout).map_err(|e| format!("status --json: {e}\n{}", text(&output.stderr)))
    }

    /// Waits until the broker's status is as it should be.
    fn wait(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value, String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status()?;
            if is_so(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(format!("it did not come to pass that {what}: {status}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A job that is running and has a checkpoint, or that has been stopped then; its number.
    fn need_job(&mut self, stopped: bool) -> Result<u64, String> {
        self.need_compnodes()?;
        let newest = |status: &Value| status["jobs"].as_array().and_then(|jobs| jobs.last()).cloned();
        let number = |job: &Value| job["job"].as_u64().ok_or_else(|| format!("a job without a number: {job}"));
        if let Some(job) = newest(&self.status()?)
            && stopped
            && job["state"]["state"] == "stopped"
        {
            return number(&job);
        }
        let sets = format!("--set train.steps={STOPPABLE_STEPS} --set checkpoint.keep=0");
        self.succeeds(&format!("fusionllm submit job.toml {sets}"))?;
        let is_under_way =
            |status: &Value| newest(status).is_some_and(|job| job["step"].as_u64() > Some(CHECKPOINT.into()));
        let status = self.wait("the job is under way", is_under_way)?;
        let job = number(&newest(&status).unwrap_or_default())?;
        if stopped {
            self.succeeds(&format!("fusionllm stop {job}"))?;
        }
        Ok(job)
    }

    /// A run directory, of a run that ended before it was done if it is to be resumed.
    fn need_run(&self, unfinished: bool) -> Result<(), String> {
        if !self.bench.path("a-run").exists() {
            self.succeeds("fusionllm train job.toml --compnodes 2 --out a-run")?;
        }
        let last = self.bench.path("a-run/checkpoints/step-8");
        if unfinished && last.exists() {
            std::fs::remove_dir_all(last).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// A Hugging Face folder, where the command reads one.
    fn need_model(&self, line: &str) -> Result<(), String> {
        if (line.contains("generate HF_DIR") || line.contains("/path/to/model")) && !self.bench.path("a-model").exists()
        {
            self.need_run(false)?;
            self.succeeds("fusionllm export a-run a-model")?;
        }
        Ok(())
    }

    /// Conversations, and what writes them out, where the command reads some.
    fn need_chats(&self, line: &str) -> String {
        if !line.contains("/path/to/chats.jsonl") {
            return String::new();
        }
        self.bench.write("chats.jsonl", &"{\"prompt\": \"a\", \"completion\": \"b\"}\n".repeat(40));
        self.bench.write("chats.jinja", CHAT_TEMPLATE);
        format!(" --set data.chat_template={}", self.bench.path("chats.jinja").display())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// What makes a job for any model one for the small model that stands for it.
fn fitting(line: &str) -> &'static str {
    match line {
        _ if line.contains("/path/to/model") => "--set data.seq_len=8 --set train.micro_batches=2",
        _ if line.contains("/path/to/cifar10") => "--set train.micro_batches=2 --set model.widths=[4,4,4,4]",
        _ => "",
    }
}

/// Replaces a word that stands by itself.
fn replace_word(line: &str, word: &str, by: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
    let mut result = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(word) {
        let (before, after) = (&rest[..at], &rest[at + word.len()..]);
        result.push_str(before);
        let is_alone = !result.ends_with(is_part) && !after.starts_with(is_part);
        result.push_str(if is_alone { by } else { word });
        rest = after;
    }
    result + rest
}

#[test]
fn only_whole_words_are_replaced() {
    assert_eq!(replace_word("train N --set a=N b N.toml NN --N", "N", "2"), "train 2 --set a=2 b N.toml NN --N");
}
