//! First boots: of a volume that was there before its bucket, and of one whose boot failed halfway.

use crate::fixtures::files::{content, read, write};
use crate::fixtures::machines::{incidents, volumes_set_aside};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Builder, Cloud, Fault, Rule, flush, independent, until};

#[test]
fn a_boot_that_fails_after_it_has_taken_the_bucket_keeps_what_is_only_on_the_volume() {
    let cloud = Cloud::new();
    let machine = cloud.machine().environment("S3_DRAIN_TIMEOUT", "1").ready();
    write(&machine, &["openclaw/workspace/a"], "pushed");
    flush(&machine);
    independent(&machine);
    cloud.proxy.refuse(true);
    write(&machine, &["openclaw/workspace/b"], "only here");
    let mut machine = machine;
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.refuse(false);
    // The record is written, and what follows fails.
    let owner = cloud.judge().key(".cvm/owner");
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("PUT").path(&owner).every(2).times(3));
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    let writes = cloud.proxy.log().iter().filter(|e| e.method == "PUT" && e.path.contains(&owner)).count();
    assert!(writes > 6, "the boot has not failed: {writes} writes");
    assert_eq!(volumes_set_aside(&machine), 0);
    let path = "openclaw/workspace/b";
    assert_eq!(read(&machine, path), Some(content(path, "only here")));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

fn local_volume(cloud: &Cloud) -> Builder {
    // What a machine in local mode leaves behind.
    let builder = cloud.machine();
    let at = builder.scratch().join("data/openclaw/workspace");
    std::fs::create_dir_all(&at).expect("a directory");
    std::fs::write(at.join("local"), "of the volume").expect("a file");
    builder
}

#[test]
fn a_local_volume_goes_into_an_empty_bucket_and_never_into_another() {
    let cloud = Cloud::new();
    let mut machine = local_volume(&cloud).ready();
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let mut machine = cloud.machine().ready();
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    machine.ok(&["sh", "-c", "echo of the bucket > /data/openclaw/workspace/local"]);
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let machine = local_volume(&cloud).ready();
    machine.line("neither merged nor pushed");
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the bucket\n");
}

#[test]
fn a_volume_that_has_not_written_yet_is_no_stranger_to_its_own_record() {
    let cloud = Cloud::new();
    // The record of ownership arrives, and nothing after it.
    cloud.proxy.conditional_puts(Some(cloud.garage.s3()));
    let machine = local_volume(&cloud).start();
    until("the record is there", PATIENCE, || {
        let there = !cloud.garage.objects("").is_empty();
        if there {
            cloud.proxy.refuse(true);
        }
        there.then_some(())
    });
    let bucket = cloud.judge();
    let machine = machine.again(|b| b);
    for segment in bucket.segments() {
        bucket.delete(&segment);
    }
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
}

#[test]
fn a_crash_before_the_first_answer_makes_the_volume_no_stranger() {
    let cloud = Cloud::new();
    let bucket = cloud.judge();
    let segment = bucket.key(".cvm/manifest/any");
    let manifest = segment.rsplit_once('/').expect("it is in a directory").0;
    cloud.proxy.add(Rule::new(Fault::NoResponse).method("PUT").path(manifest));
    let machine = local_volume(&cloud).start();
    until("the first segment has arrived", PATIENCE, || (!bucket.segments().is_empty()).then_some(()));
    let machine = machine.again(|b| b);
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    assert_eq!(volumes_set_aside(&machine), 0);
    flush(&machine);
    assert_eq!(incidents(&machine), [""; 0]);
}
