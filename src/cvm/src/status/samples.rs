//! Snapshots for tests, written by hand.

use cvm_protocol::doors::Door;
use cvm_protocol::fact::{Fact, Value};
use cvm_protocol::status::{
    Fingerprint, Phase, Remark, Service, ServiceState, Status, Step, StepState, Storage, StorageMode,
};

pub(crate) fn service(name: &str, state: ServiceState) -> Service {
    Service {
        name: name.into(),
        what: "a service".into(),
        state,
        why: None,
        pid: None,
        up_ms: None,
        first_exec_ms: None,
        first_ready_ms: None,
        restarts: 0,
        failures_in_a_row: 0,
        crash_loop: false,
        last_end: None,
        last_end_ago_ms: None,
        next_start_in_ms: None,
        next_action: None,
        required: true,
        dropped_lines: 0,
        facts: Vec::new(),
    }
}

pub(crate) fn running(name: &str, state: ServiceState, pid: i32, at: (u64, Option<u64>)) -> Service {
    Service {
        pid: Some(pid),
        up_ms: Some(11_520_000),
        first_exec_ms: Some(at.0),
        first_ready_ms: at.1,
        ..service(name, state)
    }
}

pub(crate) fn step(name: &str, state: StepState, began: Option<u64>, took: Option<u64>) -> Step {
    Step {
        name: name.into(),
        state,
        required: true,
        began_ms: began,
        took_ms: took,
        tries: 1,
        why: None,
        next_try_in_ms: None,
    }
}

/// A mux client with a queue, whose server does not renew its registration.
pub(crate) fn with_mux(now_ms: u64) -> Status {
    let mut status = healthy();
    status.services.push(running("mux", ServiceState::Ready, 140, (640, Some(700))));
    let since = |ms| Value::Since { at_ms: now_ms - ms, late_ms: Some(900_000) };
    let until = Fact::new("registered until", Value::Until { at_ms: now_ms + 3_600_000 });
    let error = "the mux-server refuses the answer to event 7: 403 ROUTE_NOT_BOUND";
    status.services[3].facts = vec![
        until.warns(Some("it answers 503; it is tried again")),
        Fact::new("waiting for the agent", Value::Count(12)),
        Fact::new("oldest of them", since(125_000)),
        Fact::text("last error", error).warns(None),
        Fact::text("not heard of", "for a day").is_bad(Some("`cvm logs mux`")),
    ];
    status
}

pub(crate) fn healthy() -> Status {
    let gateway = Service {
        restarts: 2,
        last_end: Some("killed by the kernel: out of memory, after 2 h 2 min".into()),
        last_end_ago_ms: Some(7_500_000),
        ..running("gateway", ServiceState::Ready, 131, (420, Some(9_650)))
    };
    Status {
        version: "0.1.0".into(),
        phase: Phase::Running,
        uptime_ms: 11_530_000,
        frozen: false,
        storage: Storage::new(StorageMode::Local, "the state is on the volume at /data, and is lost with it"),
        keys: vec![
            Fingerprint { name: "gateway token".into(), fingerprint: "1a2b3c4d".into() },
            Fingerprint {
                name: "SSH host key".into(),
                fingerprint: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU".into(),
            },
        ],
        doors: Vec::new(),
        remarks: Vec::new(),
        boot: vec![
            step("ssh", StepState::Done, Some(12), Some(35)),
            step("home", StepState::Done, Some(48), Some(150)),
            step("state", StepState::Done, Some(199), Some(210)),
        ],
        services: vec![
            running("sshd", ServiceState::Up, 71, (50, Some(50))),
            Service { required: false, ..running("dockerd", ServiceState::Ready, 88, (60, Some(1_240))) },
            gateway,
        ],
        healthy: true,
        unhealthy: Vec::new(),
    }
}

/// A dead bucket, and every state that needs attention.
pub(crate) fn troubled() -> Status {
    let bucket = "the bucket answers 403 to a listing: check AWS_ACCESS_KEY_ID (Schlüssel für „übermorgen“)";
    let storage = Step {
        why: Some(bucket.into()),
        next_try_in_ms: Some(31_000),
        tries: 4,
        ..step("storage", StepState::Failed, Some(50), Some(2_104))
    };
    let ssh = Step {
        required: false,
        why: Some("no key".into()),
        ..step("ssh", StepState::Failed, Some(12), Some(9_000))
    };
    Status {
        phase: Phase::Degraded,
        uptime_ms: 65_000,
        keys: Vec::new(),
        doors: vec![Door::new(
            "ENABLE_DOCKER=1",
            "the agent may use docker, and who may use docker is root in this container",
            "set ENABLE_DOCKER=0 if the agent needs no containers",
        )],
        remarks: vec![Remark {
            topic: "docker".into(),
            text: "no storage driver but vfs works here: every layer is a whole copy".into(),
        }],
        boot: vec![ssh, storage, step("home", StepState::Waiting, None, None)],
        services: troubled_services(bucket),
        healthy: false,
        unhealthy: vec![format!("boot step storage: {bucket}"), "mux is parked: exit 78 twice".into()],
        ..healthy()
    }
}

fn troubled_services(bucket: &str) -> Vec<Service> {
    let waiting = Service {
        why: Some("/readyz said no for 2 min".into()),
        restarts: 7,
        failures_in_a_row: 5,
        crash_loop: true,
        last_end: Some("exited with code 1, after 3 s".into()),
        last_end_ago_ms: Some(12_000),
        next_start_in_ms: Some(20_000),
        next_action: Some("starts in 20 s".into()),
        dropped_lines: 1,
        ..service("tunnel", ServiceState::Waiting)
    };
    vec![
        running("sshd", ServiceState::Up, 71, (9_020, None)),
        Service {
            why: Some(format!("boot step storage: {bucket}")),
            next_action: Some("starts when boot step storage is done".into()),
            ..service("gateway", ServiceState::Blocked)
        },
        waiting,
        Service {
            why: Some("exit 78 twice\u{1b}[2J".into()),
            next_action: Some("mend it, then `cvm start mux`".into()),
            ..service("mux", ServiceState::Parked)
        },
        Service {
            pid: Some(4_194_304),
            next_action: Some("look at `dmesg`".into()),
            ..service("dockerd", ServiceState::Stuck)
        },
    ]
}
