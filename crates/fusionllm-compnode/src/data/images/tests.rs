//! Folders of images and CIFAR-10: what is read, what is held out, what is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_protocol::JobSpec;
use image::{ImageFormat, Rgb, RgbImage};

use super::pixels::{Change, Picture, Scaling};
use super::*;
use crate::data::Batches;

fn job(path: &Path, more: &[&str]) -> JobSpec {
    let mut text =
        format!("[model]\nfamily = \"resnet\"\nclasses = 10\n[data]\npath = {path:?}\nformat = \"images\"\n");
    text.push_str("eval_fraction = 0.25\n[train]\nbatch = 6\nmicro_batches = 3\neval_batches = 2\n");
    let overrides: Vec<String> = more.iter().map(|o| (*o).to_owned()).collect();
    JobSpec::from_toml(&text, &overrides).unwrap()
}

/// An image of one colour.
fn write(path: &Path, size: [u32; 2], colour: [u8; 3]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(size[0], size[1], Rgb(colour)).save(path).unwrap();
}

/// Eight images each of two classes, of other sizes.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..8u8 {
        write(&folder.path().join(format!("cat/{index}.png")), [9, 7], [10 * index, 0, 0]);
        write(&folder.path().join(format!("dog/deep/{index}.JPG")), [8, 8], [200, 200, 200]);
    }
    std::fs::write(folder.path().join("readme.md"), "text").unwrap();
    folder
}

fn read(spec: &JobSpec) -> Result<ImageSet, DataError> {
    ImageSet::read(&spec.data, &Reading::default())
}

fn refusal(spec: &JobSpec) -> String {
    let error = read(spec).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn the_last_of_each_class_are_held_out() {
    let folder = folder();
    let set = read(&job(folder.path(), &[])).unwrap();
    assert_eq!((set.len(), set.classes()), ((12, 4), ["cat".to_owned(), "dog".to_owned()].as_slice()));
    let report = set.report();
    assert_eq!((report.files, report.train_tokens, report.eval_tokens, report.classes), (16, 12, 4, Some(2)));
    assert!((report.unigram_loss - 2f64.ln()).abs() < 1e-12);
    assert_eq!(report.notes[0], "2 classes: `cat`, `dog`");
    assert!(report.notes[1].contains("1 file or folder, of another form than data.format: `readme.md`"));
    let remembered = report.fingerprint.unwrap();
    assert_eq!((remembered.count, remembered.tokenizer.entries), (16, 2));
    let held_out: Vec<&str> =
        remembered.files.iter().filter(|file| file.train_bytes == 0).map(|file| file.name.as_str()).collect();
    assert_eq!(held_out, ["cat/6.png", "cat/7.png", "dog/deep/6.JPG", "dog/deep/7.JPG"]);
    assert!(set.check_classes(2).unwrap().is_none());
    assert!(set.check_classes(3).unwrap().is_some());
    let error = set.check_classes(1).unwrap_err().to_string();
    assert_eq!(error, "data.path has images of 2 classes, the model tells 1 apart: set model.classes = 2");
}

#[test]
fn classes_of_private_images_stay_with_their_owner() {
    let folder = folder();
    let report = read(&job(folder.path(), &["data.private=true"])).unwrap().report();
    let told = format!("{report:?}");
    assert!(!told.contains("cat") && !told.contains("dog") && !told.contains("readme"), "{told}");
}

#[test]
fn the_only_image_of_a_private_class_does_not_tell_its_name() {
    let folder = folder();
    write(&folder.path().join("ant/only.png"), [4, 4], [0; 3]);
    let error = refusal(&job(folder.path(), &["data.private=true"]));
    assert!(error.ends_with("a class has one image, expected at least two: one of them is held out"), "{error}");
}

#[test]
fn any_name_may_be_that_of_a_class() {
    let folder = folder();
    for name in ["target/0.png", "target/1.png", "runs/0.png", "runs/1.png"] {
        write(&folder.path().join(name), [4, 4], [0; 3]);
    }
    assert_eq!(read(&job(folder.path(), &[])).unwrap().classes(), ["cat", "dog", "runs", "target"]);
    #[cfg(unix)]
    {
        let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"K\xe4se");
        write(&folder.path().join(name).join("0.png"), [4, 4], [0; 3]);
        assert!(refusal(&job(folder.path(), &[])).ends_with("whose name is no UTF-8: rename the folder"));
    }
}

#[test]
fn images_of_one_class_are_told() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["cat/0.png", "cat/1.png"] {
        write(&folder.path().join(name), [4, 4], [0; 3]);
    }
    let note = read(&job(folder.path(), &[])).unwrap().check_classes(1).unwrap().unwrap();
    assert!(note.contains("one class"), "{note}");
}

/// An image is trained on under the class that it had when it was looked at.
#[test]
fn images_that_change_while_they_are_trained_on_are_named() {
    let folder = folder();
    let spec = job(folder.path(), &[]);
    let of_folder = batches(&spec, 4);
    of_folder.train(0, 0).unwrap();
    for index in 0..8 {
        write(&folder.path().join(format!("cat/{index}.png")), [9, 7], [0, 255, index]);
        std::fs::rename(folder.path().join("cat/0.png"), folder.path().join(format!("dog/deep/{index}.JPG"))).unwrap();
        write(&folder.path().join("cat/0.png"), [9, 7], [0, 255, 0]);
    }
    let error = of_folder.train(0, 0).unwrap_err().to_string();
    assert!(error.ends_with("has changed since training began with it"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    cifar(at("data_batch_1.bin"), &[3, 9]);
    cifar(at("test_batch.bin"), &[1, 2]);
    let spec = job(folder.path(), &["data.format=cifar10"]);
    let of_cifar = batches(&spec, 32);
    of_cifar.train(0, 0).unwrap();
    cifar(at("data_batch_1.bin"), &[9, 3]);
    let error = of_cifar.train(0, 0).unwrap_err().to_string();
    assert!(error.ends_with("data_batch_1.bin: has changed since training began with it"), "{error}");
}

/// The decoder fills what a JPEG lacks with grey, and says nothing.
#[test]
fn a_damaged_jpeg_is_named() {
    let noise = RgbImage::from_fn(64, 48, |x, y| Rgb([x * 7 + y * 13, x * y, x ^ (y * 5)].map(|v| (v % 251) as u8)));
    let mut whole = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut whole, ImageFormat::Jpeg).unwrap();
    let whole = whole.into_inner();
    Picture::check(&whole).unwrap();
    // Bytes after the end are not its own.
    Picture::check(&[&whole[..], b"and more"].concat()).unwrap();
    for share in [30, 50, 90, 99] {
        let error = Picture::check(&whole[..whole.len() * share / 100]).unwrap_err();
        assert!(error.contains("JPEG image"), "{share} %: {error}");
    }
    let short = &whole[..whole.len() - 2];
    assert!(Picture::check(short).unwrap_err().ends_with("it is cut short"));
    // It would be trained on.
    assert!(Picture::decode(short).is_ok());
    // A mark in the middle of the pixels.
    let mut odd = whole.clone();
    odd[whole.len() / 2..][..4].copy_from_slice(&[0xff, 0xc1, 0, 4]);
    assert!(Picture::check(&odd).unwrap_err().contains("JPEG image"));
}

#[test]
fn pictures_that_would_fill_the_memory_are_refused() {
    let png = |width, height| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::GrayImage::new(width, height).write_to(&mut bytes, ImageFormat::Png).unwrap();
        Picture::decode(bytes.get_ref()).map(drop)
    };
    assert_eq!(png(500, 5), Ok(()));
    assert!(png(505, 5).unwrap_err().contains("505 x 5 pixels, expected sides of which one is at most 100 times"));
    assert!(png(11_600, 11_600).unwrap_err().contains("expected at most 134217728 in all"));
}

#[test]
fn what_is_no_image_or_of_no_class_is_named() {
    let folder = folder();
    let spec = job(folder.path(), &[]);
    let at = |name: &str| folder.path().join(name);
    let cases: [(&str, &[u8], &str); 3] = [
        ("cat/broken.png", b"\x89PNG\r\n\x1a\n and no more", "is no PNG or JPEG image that can be read"),
        ("cat/empty.jpeg", b"", "it is empty"),
        ("cat/text.png", b"text", "it begins as neither"),
    ];
    for (name, content, reason) in cases {
        std::fs::write(at(name), content).unwrap();
        let error = refusal(&spec);
        assert!(error.contains(name) && error.contains(reason), "{error}");
        std::fs::remove_file(at(name)).unwrap();
    }
    // Cut short.
    let whole = std::fs::read(at("dog/deep/0.JPG")).unwrap();
    std::fs::write(at("dog/short.jpg"), &whole[..20]).unwrap();
    assert!(refusal(&spec).contains("dog/short.jpg"));
    std::fs::remove_file(at("dog/short.jpg")).unwrap();
    write(&at("loose.png"), [4, 4], [0; 3]);
    assert!(
        refusal(&spec).ends_with("loose.png: is of no class: expected it in a folder that is named like its class")
    );
    std::fs::remove_file(at("loose.png")).unwrap();
    write(&at("ant/only.png"), [4, 4], [0; 3]);
    assert!(refusal(&spec).contains("class `ant` has one image, expected at least two"));
    let named = job(&at("ant/only.png"), &[]);
    assert!(refusal(&named).ends_with("is a file, expected a folder with a folder of images for each class"));
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(&job(empty.path(), &[])).contains("holds no folder of a class with files that end in .png"));
}

#[test]
fn pictures_are_fitted_and_scaled() {
    let scaling = Scaling { size: 4, mean: [0.5; 3], std: [0.25; 3] };
    let numbers = |picture: Picture, change: Change| {
        let mut out = Vec::new();
        picture.write(&scaling, change, &mut out);
        out
    };
    let encoded = |image: &RgbImage| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, ImageFormat::Png).unwrap();
        Picture::decode(bytes.get_ref()).unwrap()
    };
    // A wide one of stripes, of which the middle is taken.
    let wide = RgbImage::from_fn(8, 4, |x, _| Rgb([if (2..6).contains(&x) { 255 } else { 0 }, x as u8, 0]));
    let found = numbers(encoded(&wide), Change::default());
    assert_eq!(found.len(), 3 * 16);
    assert!(found[..16].iter().all(|&red| red == 2.0), "{found:?}");
    let green: Vec<f32> = [2u8, 3, 4, 5].map(|x| (f32::from(x) / 255.0 - 0.5) / 0.25).to_vec();
    assert!(found[16..20].iter().zip(&green).all(|(a, b)| (a - b).abs() < 1e-6));
    assert!(found[32..].iter().all(|&blue| blue == -2.0));
    let mirrored = numbers(encoded(&wide), Change { is_mirrored: true, ..Change::default() });
    assert!(mirrored[16..20].iter().zip(green.iter().rev()).all(|(a, b)| (a - b).abs() < 1e-6));
    // What comes in is black.
    let shifted = numbers(encoded(&wide), Change { shift: [1, -1], ..Change::default() });
    assert_eq!(&shifted[..8], [-2.0, -2.0, -2.0, -2.0, 2.0, 2.0, 2.0, -2.0]);
    // Twice as large, of one colour.
    let large = RgbImage::from_pixel(8, 10, Rgb([255, 0, 255]));
    assert!(numbers(encoded(&large), Change::default())[..16].iter().all(|&red| red == 2.0));
}

fn batches(spec: &JobSpec, size: usize) -> ImageBatches {
    ImageBatches::new(Arc::new(read(spec).unwrap()), size, &spec.data, &spec.train.view(), spec.train.seed)
}

#[test]
fn a_batch_is_a_function_of_seed_and_step_and_each_image_comes_once_an_epoch() {
    let folder = folder();
    let changes = ["data.crop_padding=2", "data.flip=true", "train.seed=5"];
    let (one, again) = (batches(&job(folder.path(), &changes), 8), batches(&job(folder.path(), &changes), 8));
    for (step, index) in [(3, 2), (0, 0), (70, 1), (3, 2)] {
        assert_eq!(one.train(step, index).unwrap(), again.train(step, index).unwrap());
    }
    assert_ne!(one.train(0, 0).unwrap(), one.train(2, 0).unwrap());
    let plain = batches(&job(folder.path(), &[]), 8);
    // Two steps are an epoch of 12, six of each class.
    let mut reds = Vec::new();
    let mut classes = Vec::new();
    for (step, index) in (0..2).flat_map(|step| (0..3).map(move |index| (step, index))) {
        let (images, labels) = plain.train(step, index).unwrap();
        assert_eq!((images.shape(), labels.shape()), ([2, 3, 8, 8].as_slice(), [2, 1].as_slice()));
        let values = images.as_f32().unwrap();
        reds.extend([0, 3 * 64].map(|at| ((values[at] * 0.229 + 0.485) * 255.0).round() as i32));
        let fusionllm_codec::Values::I32(found) = labels.values() else { panic!() };
        classes.extend(found.clone());
    }
    let mut cats: Vec<i32> = reds.iter().zip(&classes).filter(|(_, class)| **class == 0).map(|(red, _)| *red).collect();
    cats.sort_unstable();
    assert_eq!(cats, [0, 10, 20, 30, 40, 50]);
    let (first, _) = plain.eval(0).unwrap();
    assert!(((first.as_f32().unwrap()[0] * 0.229 + 0.485) * 255.0 - 60.0).abs() < 0.1);
    assert_eq!(plain.eval(1).unwrap(), plain.eval(1).unwrap());
}

/// A file of CIFAR-10 with these classes; the pixels of image i are all i.
fn cifar(path: PathBuf, classes: &[u8]) {
    let record = |(index, &class): (usize, &u8)| {
        let mut record = vec![index as u8; cifar10::RECORD];
        record[0] = class;
        record
    };
    std::fs::write(path, classes.iter().enumerate().flat_map(record).collect::<Vec<u8>>()).unwrap();
}

#[test]
fn cifar10_is_read_in_its_binary_form() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let spec = job(folder.path(), &["data.format=cifar10"]);
    assert!(refusal(&spec).contains("holds no data_batch_1.bin and so on of CIFAR-10"));
    cifar(at("data_batch_1.bin"), &[3, 9]);
    // A copy does not count twice.
    cifar(at("data_batch_2 (copy).bin"), &[0; 4]);
    cifar(at("data_batch_2.bin"), &[0; 4]);
    assert!(refusal(&spec).contains("holds no test_batch.bin of CIFAR-10"));
    cifar(at("test_batch.bin"), &[1, 2, 3, 4]);
    std::fs::write(at("batches.meta.txt"), "airplane").unwrap();
    let set = read(&spec).unwrap();
    assert_eq!((set.len(), set.classes().len()), ((6, 4), 10));
    let batches = ImageBatches::new(Arc::new(set), 32, &spec.data, &spec.train.view(), spec.train.seed);
    let (images, labels) = batches.eval(1).unwrap();
    assert_eq!(labels.values(), &fusionllm_codec::Values::I32(vec![3, 4]));
    let red = (2.0 / 255.0 - 0.4914) / 0.247;
    assert!((f64::from(images.as_f32().unwrap()[0]) - red).abs() < 1e-6);

    cifar(at("data_batch_2.bin"), &[0, 17]);
    assert!(refusal(&spec).ends_with("data_batch_2.bin: image 1 has class 17, expected 0 to 9, as CIFAR-10 has them"));
    std::fs::write(at("data_batch_2.bin"), vec![0; cifar10::RECORD + 5]).unwrap();
    assert!(refusal(&spec).contains("data_batch_2.bin: has 5 bytes after 1 images, expected 3073 bytes for each"));
    std::fs::write(at("data_batch_2.bin"), "").unwrap();
    assert!(refusal(&spec).ends_with("data_batch_2.bin: is empty, expected images of CIFAR-10"));
}
