//! qemu-io, `qemu-img bench` and fio: many requests at once, of every kind.

use super::{Chance, DISK_BYTES, MIB, Trial, same};

/// Lanes of the disk in which a script of qemu-io has one request each in flight.
const LANES: usize = 8;

/// Rounds of requests of every kind at any byte, one in each lane, with what must be read then.
fn script(chance: &mut Chance, rounds: usize) -> Vec<String> {
    let lane_bytes = DISK_BYTES / LANES;
    let mut script = Vec::new();
    for _ in 0..rounds {
        let mut reads = Vec::new();
        for lane in 0..LANES {
            let aligned = chance.below(2) == 0;
            let unit = if aligned { 4096 } else { 1 };
            let longest = [4096, 65536, 1 << 19][chance.below(3)];
            let len = 1 + chance.below(longest);
            let len = if aligned { len.next_multiple_of(4096) } else { len };
            let within = chance.below(lane_bytes - len) / unit * unit;
            let at = (lane * lane_bytes).next_multiple_of(unit) + within;
            let len = len.min(DISK_BYTES - at);
            let byte = 1 + chance.below(255);
            let (request, byte) = match chance.below(8) {
                0 => (format!("aio_write -z {at} {len}"), 0),
                1 => (format!("aio_write -z -u {at} {len}"), 0),
                2 => (format!("aio_write -z -u -f {at} {len}"), 0),
                3 => (format!("discard {at} {len}"), 0),
                4 => (format!("aio_write -P 0 {at} {len}"), 0),
                5 => (format!("aio_write -f -P {byte} {at} {len}"), byte),
                _ => (format!("aio_write -P {byte} {at} {len}"), byte),
            };
            script.push(request);
            reads.push(format!("aio_read -P {byte} {at} {len}"));
        }
        script.push("aio_flush".to_owned());
        script.extend(reads);
        script.push("aio_flush".to_owned());
        if chance.below(4) == 0 {
            script.push("flush".to_owned());
        }
    }
    script
}

#[test]
fn qemu_io_in_any_order_is_as_on_a_raw_file() {
    let mut trial = Trial::over_an_image();
    let mut chance = Chance(11);
    trial.qemu_io_both(&script(&mut chance, 12));
    trial.agree();
    let rounds = script(&mut chance, 25);
    trial.commit_during(|trial| trial.qemu_io_both(&rounds));
    trial.agree();
    trial.home.ok(&["verify", "--deep"]);
}

#[test]
fn qemu_img_bench_writes_and_reads() {
    let mut trial = Trial::over_an_image();
    let write = ["-w", "-c", "3000", "-d", "16", "-s", "4k", "-S", "12k", "-o", "1M"];
    let forced = ["-w", "-c", "500", "-d", "4", "-s", "64k", "-o", "4k"];
    for (options, pattern, flush) in [(&write[..], "170", "100"), (&forced[..], "5", "50")] {
        trial.commit_during(|trial| {
            for target in [trial.uri().as_str(), "model"] {
                let fixed = ["bench", "-f", "raw", "-t", "writeback", "--pattern", pattern];
                let flushes = ["--flush-interval", flush];
                trial.run("qemu-img", &[&fixed[..], &flushes, options, &[target]].concat());
            }
        });
    }
    trial.run("qemu-img", &["bench", "-f", "raw", "-c", "2000", "-d", "32", &trial.uri()]);
    trial.agree();
}

/// Parts of one fio run, each in a place of its own, with a place and a size in MiB.
const JOBS: &[(&str, usize, usize, &str)] = &[
    ("blocks", 0, 8, "--rw=randwrite --verify=crc32c --fsync=64 --bs=4k"),
    ("odd", 8, 8, "--rw=randwrite --verify=crc32c --fsync=64 --bsrange=512-64k --bs_unaligned"),
    ("large", 16, 4, "--rw=randwrite --verify=crc32c --fsync=2 --bs=1m"),
    ("trimmed", 20, 4, "--rw=randtrimwrite --verify=crc32c --fsync=64 --bs=8k"),
    ("zeros", 24, 4, "--rw=randwrite --verify=pattern --verify_pattern=0x00 --bs=16k"),
];

fn fio(trial: &Trial, options: &[&str], jobs: &[(&str, usize, usize, &str)]) {
    let mut arguments: Vec<String> = options.iter().map(|&it| it.to_owned()).collect();
    arguments.extend(["--thread", "--verify_fatal=1", "--iodepth=16"].map(str::to_owned));
    for (name, at, size, rest) in jobs {
        arguments.extend([format!("--name={name}"), format!("--offset={at}m")]);
        arguments.push(format!("--size={size}m"));
        arguments.extend(rest.split(' ').map(str::to_owned));
    }
    let said = trial.run("fio", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(said.matches("err= 0").count(), jobs.len(), "{said}");
}

#[test]
fn fio_verifies_what_several_connections_wrote_and_what_was_committed() {
    let mut trial = Trial::blank(32 * MIB);
    let uri = format!("--uri={}", trial.uri());
    let fill = format!("write -P 1 {} {}", 20 * MIB, 12 * MIB);
    trial.run("qemu-io", &["-f", "raw", "-c", &fill, &trial.uri()]);
    trial.commit_during(|trial| {
        let trims = ("trims", 28, 4, "--rw=randtrim --bs=4k");
        fio(trial, &["--ioengine=nbd", &uri], &[JOBS, &[trims]].concat());
    });
    let snapshot = trial.home.ok(&["disk", "commit", "box", "vm"]);
    // The export is a file like any other, and has what fio's jobs wrote.
    trial.home.ok(&["export", &format!("{}:root", snapshot.trim()), "model"]);
    fio(&trial, &["--verify_only", "--ioengine=psync", "--filename=model"], JOBS);
    same(&trial.model()[24 * MIB..], &vec![0; 8 * MIB], "zeros and trims over data");
    trial.agree();
}

/// Blocks are trimmed and written again and again, without an order that could be checked.
#[test]
fn fio_trims_and_writes_beside_each_other() {
    let mut trial = Trial::over_an_image();
    let uri = format!("--uri={}", trial.uri());
    trial.commit_during(|trial| {
        let mix = ["--name=mix", "--ioengine=nbd", &uri, "--rw=randtrimwrite", "--bs=4k,4k,64k"];
        let rest = ["--iodepth=8", "--numjobs=4", "--thread", "--size=6m", "--fsync=40"];
        let places = ["--offset_increment=8m", "--norandommap"];
        let said = trial.run("fio", &[&mix[..], &rest, &places].concat());
        assert_eq!(said.matches("err= 0").count(), 4, "{said}");
    });
    // Nothing says what is there now; but all must say the same.
    trial.run("nbdcopy", &[&trial.uri(), "model"]);
    trial.agree();
}
