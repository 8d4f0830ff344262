//! Models of images: data, training over CompNodes, resuming, exporting.

use std::path::Path;

use serde_json::Value;

use crate::process::{Bench, json_lines, losses, text};

const JOB: &str = "
name = \"vision\"
[model]
family = \"resnet\"
depths = [1, 1]
widths = [4, 8]
image_size = 8
[data]
path = \"cifar\"
format = \"cifar10\"
crop_padding = 1
flip = true
[train]
steps = 12
batch = 16
micro_batches = 4
optimizer = \"sgd\"
lr = 0.05
warmup = 0
eval_every = 6
eval_batches = 4
[placement]
strategy = \"equal-compute\"
[compression]
policy = \"dense\"
[checkpoint]
every = 6
";

/// Bytes of a CIFAR-10 image.
const RECORD: usize = 3073;

/// Images in CIFAR-10's binary form, each class of a colour of its own, with noise.
fn cifar(path: &Path, images: usize) {
    let mut bytes = Vec::with_capacity(images * RECORD);
    for image in 0..images {
        let class = image % 10;
        bytes.push(class as u8);
        for at in 0..RECORD - 1 {
            let noise = (image * 7919 + at * 104_729) / 13 % 64;
            bytes.push((class * 19 * (1 + at / 1024) % 192 + noise) as u8);
        }
    }
    std::fs::write(path, bytes).unwrap();
}

pub(crate) fn make_cifar(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    cifar(&folder.join("data_batch_1.bin"), 60);
    cifar(&folder.join("data_batch_2.bin"), 40);
    cifar(&folder.join("test_batch.bin"), 20);
}

fn bench() -> Bench {
    let bench = Bench::new();
    make_cifar(&bench.path("cifar"));
    bench.write("job.toml", JOB);
    bench
}

fn column(bench: &Bench, out: &str, name: &str) -> Vec<u64> {
    let lines = json_lines(&bench.path(out).join("metrics.jsonl"));
    lines.iter().filter_map(|line| line[name].as_f64()).map(f64::to_bits).collect()
}

#[test]
fn a_resnet_trains_alike_on_any_cut_and_goes_on_where_it_stopped() {
    let bench = bench();
    let out = bench.succeed("train job.toml --out one --compnodes 1");
    for words in ["100 training images of 10 classes, 20 held out", "nats per image", "accuracy ", "images/s"] {
        assert!(out.contains(words), "`{words}` is missing in\n{out}");
    }
    assert!(!out.contains("the model writes") && !out.contains("token"), "{out}");
    let losses = losses(&bench.path("one"));
    assert!(losses[11] < losses[0], "{losses:?}");
    let of = |out: &str| ["loss", "eval_loss", "eval_accuracy"].map(|name| column(&bench, out, name));
    let one = of("one");
    assert_eq!((one[0].len(), one[1].len(), one[2].len()), (12, 2, 2));
    let cut =
        "[{compnode=0,last_op=\"layer1.0.bn1\"},{compnode=1,last_op=\"layer2.0.conv2\"},{compnode=2,last_op=\"loss\"}]";
    for (out, sets) in [
        ("cut", format!("--compnodes 3 --set placement.stages={cut}")),
        ("private", "--compnodes 3 --set data.private=true --set data.private_seed=job".to_owned()),
        ("half", "--compnodes 2 --set train.steps=6 --set train.schedule=constant".to_owned()),
    ] {
        bench.succeed(&format!("train job.toml --out {out} --set train.clip=0 {sets}"));
    }
    bench.succeed("train job.toml --out exact --compnodes 1 --set train.clip=0");
    assert_eq!(of("cut"), of("exact"));
    assert_eq!(of("private"), of("exact"));
    // The samples, the running values and the momentum are those at which it stopped.
    bench.succeed("train job.toml --out whole --compnodes 1 --set train.clip=0 --set train.schedule=constant");
    bench.succeed("train --resume half --set train.steps=12");
    assert_eq!(of("half"), of("whole"));
}

#[test]
fn a_resnet_is_exported_under_torchvisions_names_and_trains_on_from_there() {
    let bench = bench();
    bench.succeed("train job.toml --out run --compnodes 2");
    bench.succeed("export run resnet");
    let config: Value = serde_json::from_slice(&std::fs::read(bench.path("resnet/config.json")).unwrap()).unwrap();
    assert_eq!((&config["model_type"], &config["classes"]), (&"torchvision-resnet".into(), &10.into()));
    let weights = std::fs::read(bench.path("resnet/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&weights).unwrap();
    for name in ["conv1.weight", "layer2.0.downsample.1.running_var", "bn1.running_mean", "fc.bias"] {
        assert!(file.tensor(name).is_ok(), "{name}");
    }
    let variance = file.tensor("bn1.running_var").unwrap();
    assert!(variance.data() != 1f32.to_le_bytes().repeat(4), "it has not moved");
    // Evaluated before it learns anything, the folder is what the run ended as.
    let model = bench.path("resnet").display().to_string();
    let text_of = JOB.replace("family = \"resnet\"\ndepths = [1, 1]\nwidths = [4, 8]\nimage_size = 8\n", "");
    bench.write("again.toml", &text_of.replace("[model]\n", &format!("[model]\npath = {model:?}\n")));
    bench.succeed("train again.toml --out again --set train.steps=1 --set train.lr=1e-30 --set train.eval_every=0");
    let (before, now) = (column(&bench, "run", "eval_loss"), column(&bench, "again", "eval_loss"));
    // One more step has moved the running values.
    let (before, now) = (f64::from_bits(*before.last().unwrap()), f64::from_bits(now[0]));
    assert!((before - now).abs() < 0.2 * before, "{before} {now}");
    let output = bench.run("generate run --prompt a");
    assert!(text(&output.stderr).contains("is a model of images, which writes no text"), "{}", text(&output.stderr));
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let bench = bench();
    std::fs::write(bench.path("cifar/data_batch_3.bin"), vec![0; 100]).unwrap();
    for (sets, words) in [
        ("--set data.format=text", "data.format`: is `text`, expected `images` or `cifar10`"),
        ("--set model.classes=3", "images of 10 classes, the model tells 3 apart: set model.classes = 10"),
        ("", "data_batch_3.bin: has 100 bytes after 0 images, expected 3073 bytes for each"),
        ("--set data.seq_len=9", "data.seq_len`: is given, but data.format has images"),
        ("--set model.n_layer=2", "model.n_layer`: is a size of GPT-2"),
        ("--set model.widths=[4]", "model.widths`: has 1 numbers, expected 2"),
        ("--set model.dropout=0.1", "dropout is 0.1, expected 0"),
        ("--set lora.rank=4", "lora.rank is 4, expected 0 for a model with batch norm"),
        ("--set data.std=[0.1,0.1]", "expected three numbers, of red, green and blue"),
        ("--set model.image_size=2 --set train.batch=4", "has one value for each channel in a micro-batch"),
    ] {
        if sets.contains("classes") {
            std::fs::remove_file(bench.path("cifar/data_batch_3.bin")).unwrap();
        }
        let output = bench.run(&format!("train job.toml --out run {sets}"));
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{sets}: {err}");
        assert!(err.contains(words) && err.trim_end().lines().count() == 1, "{sets}: {err}");
        std::fs::write(bench.path("cifar/data_batch_3.bin"), vec![0; 100]).unwrap();
    }
    let output = bench.run("train job.toml --out run --set model.name=gpt2 --set data.format=text");
    assert!(text(&output.stderr).contains("model.family`: is given beside model.name"), "{}", text(&output.stderr));
}
