//! Describes each service and each task to a keeper, with the secrets that it needs and no others. PID 1 keeps nothing
//! else of the configuration once it has booted.
//!
//! `MASTER_KEY` and the bucket's passwords are not among them: they are wiped with the environment. Services of
//! ours are started again and again, so their specifications lie ready in sealed memory files, of which only the
//! descriptors are kept.

use cvm_machine::description::{self, Prepare, Service};
use cvm_machine::gate::GateName;
use cvm_protocol::authorized_keys::AuthorizedKey;
use cvm_protocol::json_lines::line;
use cvm_protocol::keeper::{Channel, KeeperSpec, Leftovers, Log, Probe, ProbeSpec};
use cvm_protocol::paths;
use cvm_protocol::task::{DockerUse, StateTask, Task};
use cvm_protocol::volume::Claim;
use cvm_secrets::base64_bytes::{PackedBytes, PackedEnvironment};
use cvm_secrets::keys::{DeviceSeed, GatewayToken, HostKeySeed, KeyRing};
use cvm_secrets::secret::Secret;
use cvm_sys::memfd;
use cvm_system::config::{
    Config, Docker, FirstBoot, Gateway, Log as LogSettings, LogFormat, Ssh, WorkspaceFiles,
};
use cvm_system::entry::Specifications;
use cvm_system::env::Environment;
use cvm_system::gates;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;
use zeroize::Zeroizing;

/// The contract's size of a log file; one old one is kept.
const LOG_BYTES: u64 = 10 * 1024 * 1024;
/// One probe's answer. A gateway that is busy for this long is asked again.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between questions while the answer is no: what "ready" may be late by.
const PROBE_EAGER: Duration = Duration::from_millis(250);
/// Between questions while the answer is yes.
const PROBE_CALM: Duration = Duration::from_secs(15);

pub(crate) struct Launcher {
    gateway: Gateway,
    first_boot: FirstBoot,
    ssh: Ssh,
    docker: Docker,
    log: LogSettings,
    passthrough: Vec<(Vec<u8>, Secret)>,
    token: Option<GatewayToken>,
    device_seed: Option<DeviceSeed>,
    host_key_seed: Option<HostKeySeed>,
    /// What this boot says of itself to the volume.
    claim: Claim,
    /// What services of ours are told, sealed, by their names.
    specifications: Vec<(&'static str, OwnedFd)>,
    /// Where the binaries of this build lie.
    home: PathBuf,
}

impl Launcher {
    pub(crate) fn new(
        config: Config,
        environment: &Environment,
        keys: Option<KeyRing>,
        specifications: Specifications,
        claim: Claim,
        home: PathBuf,
    ) -> Self {
        let passthrough = environment.passthrough().map(|(n, v)| (n.to_vec(), v.duplicate())).collect();
        let (token, device_seed, host_key_seed) = match keys {
            Some(keys) => (Some(keys.gateway_token), Some(keys.device_seed), Some(keys.host_key_seed)),
            None => (None, None, None),
        };
        // Taken apart by name: the master key and the bucket's credentials are dropped here.
        let Config { gateway, first_boot, ssh, docker, log, .. } = config;
        Self {
            gateway,
            first_boot,
            ssh,
            docker,
            log,
            passthrough,
            token,
            device_seed,
            host_key_seed,
            claim,
            specifications: sealed(specifications),
            home,
        }
    }

    /// The random token of a machine without `MASTER_KEY`, as the state step found it.
    pub(crate) fn learn_token(&mut self, token: &PackedBytes) {
        self.token = token.unpack().and_then(|bytes| GatewayToken::parse(&bytes));
    }

    pub(crate) fn service(&self, service: &Service, run: &str) -> KeeperSpec {
        let liveness = service.liveness.as_ref().map(|(limits, probe)| {
            // Four questions within the silence that is allowed.
            let calm = PROBE_CALM.min(limits.silence / 4);
            spec_of(probe, PROBE_EAGER.min(calm), calm)
        });
        KeeperSpec {
            name: service.name.into(),
            run: run.into(),
            argv: self.argv(&service.argv),
            environment: self.environment(service.environment, &service.user),
            user: service.user.clone(),
            directory: service.directory.into(),
            leftovers: service.leftovers,
            oom_score_adj: service.oom_score_adj,
            limits: service.limits,
            channel: if service.has_channel { Channel::Service } else { Channel::None },
            log: self.log(service.name),
            liveness,
            startup: service.startup.as_ref().map(|p| spec_of(p, PROBE_EAGER, PROBE_CALM)),
            readiness: service.readiness.as_ref().map(|p| spec_of(p, PROBE_EAGER, PROBE_CALM)),
        }
    }

    /// What a service of ours is told, sealed.
    pub(crate) fn specification(&self, service: &Service) -> Option<BorrowedFd<'_>> {
        self.specifications.iter().find(|(name, _)| *name == service.name).map(|(_, sealed)| sealed.as_fd())
    }

    /// A program without a slash lies beside our own.
    fn argv(&self, words: &[String]) -> Vec<String> {
        let mut argv = words.to_vec();
        if let Some(program) = argv.first_mut().filter(|program| !program.contains('/')) {
            *program = self.home.join(&program).to_string_lossy().into_owned();
        }
        argv
    }

    /// The repair command of a service, with the same user, environment and directory.
    pub(crate) fn repair(&self, service: &Service, run: &str) -> KeeperSpec {
        let argv = service.repair.clone().unwrap_or_default();
        let channel = Channel::None;
        KeeperSpec {
            argv,
            channel,
            liveness: None,
            startup: None,
            readiness: None,
            ..self.service(service, run)
        }
    }

    /// None for a step that no process carries out.
    pub(crate) fn step(&self, step: GateName, run: &str) -> Option<KeeperSpec> {
        Some(self.task(step.0, run, &self.task_of(step)?))
    }

    pub(crate) fn prepare(&self, prepare: Prepare, service: &str, run: &str) -> KeeperSpec {
        let task = match prepare {
            Prepare::Dockerd => Task::DockerPrepare,
            Prepare::FreePort(port) => Task::FreePort { port, service: service.to_owned() },
        };
        self.task(&format!("{service}-prepare"), run, &task)
    }

    pub(crate) fn sweep(&self, service: &Service, run: &str) -> KeeperSpec {
        let listens_on = match service.leftovers {
            Leftovers::Kill => None,
            // Login sessions stay; a listener that stayed would keep the port from the next one.
            Leftovers::Leave => Some(self.ssh.port.get()),
        };
        let task = Task::Sweep { run: run.to_owned(), listens_on };
        // Another run name: the task looks for processes of the run and must not find itself.
        self.task(&format!("{}-sweep", service.name), &format!("{run}-sweep"), &task)
    }

    fn task_of(&self, step: GateName) -> Option<Task> {
        Some(match step {
            gates::SSH => Task::Ssh {
                port: self.ssh.port.get(),
                seed: self.host_key_seed.as_ref().map(|s| PackedBytes::pack(s.expose())),
                trust_host_keys: self.ssh.trust_host_keys,
            },
            gates::VOLUME => Task::Volume {
                claim: self.claim.clone(),
                extra_keys: lines(self.ssh.authorized_keys.iter().map(AuthorizedKey::line)),
                trust_host_keys: self.ssh.trust_host_keys,
            },
            gates::HOME => Task::Home {
                user: self.gateway.user.as_str().into(),
                docker: match self.docker {
                    Docker::On => DockerUse::Allowed,
                    Docker::Off => DockerUse::None,
                    Docker::OffByDefault => DockerUse::NoneByDefault,
                },
            },
            gates::STATE => Task::State(StateTask {
                user: self.gateway.user.as_str().into(),
                port: self.gateway.port.get(),
                redpill: self.gateway.redpill,
                config: self.first_boot.config.as_ref().map(|c| PackedBytes::pack(c.expose())),
                workspace: self.first_boot.workspace.as_ref().map(packed_files),
                device_seed: self.device_seed.as_ref().map(|s| PackedBytes::pack(s.expose())),
                token: self.token.as_ref().map(|t| PackedBytes::pack(t.expose().as_bytes())),
            }),
            // A service opens it.
            _ => return None,
        })
    }

    fn task(&self, name: &str, run: &str, task: &Task) -> KeeperSpec {
        KeeperSpec {
            name: name.into(),
            run: run.into(),
            argv: self.argv(&["cvm-task".to_owned(), name.to_owned()]),
            environment: self.environment(description::Environment::default(), "root"),
            user: "root".into(),
            directory: "/".into(),
            leftovers: Leftovers::Kill,
            oom_score_adj: 0,
            limits: None,
            channel: Channel::Task(PackedBytes::pack(&line(task))),
            // The output of all tasks goes into one file.
            log: Log { copy_to_stdout: false, ..self.log("steps") },
            liveness: None,
            startup: None,
            readiness: None,
        }
    }

    fn log(&self, name: &str) -> Log {
        Log {
            file: format!("{}/{name}.log", paths::LOGS),
            rotate_bytes: LOG_BYTES,
            copy_to_stdout: self.log.services,
            json: matches!(self.log.format, LogFormat::Json),
        }
    }

    fn environment(&self, kind: description::Environment, user: &str) -> PackedEnvironment {
        let path = match kind.path_first {
            Some(first) => format!("{first}:{}", paths::PATH),
            None => paths::PATH.to_owned(),
        };
        let home = home_of(user);
        let mut pairs: Vec<(&[u8], &[u8])> = Vec::new();
        if kind.of_the_gateway {
            pairs.extend(self.passthrough.iter().map(|(n, v)| (n.as_slice(), v.expose())));
            pairs.extend(self.token.iter().map(|t| (&b"OPENCLAW_GATEWAY_TOKEN"[..], t.expose().as_bytes())));
        }
        pairs.extend(kind.variables.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())));
        // A user's LANG is passed through; a service without one still speaks UTF-8.
        let has_lang = pairs.iter().any(|(name, _)| *name == b"LANG");
        let own = [("PATH", path.as_str()), ("HOME", &home), ("USER", user), ("LOGNAME", user)];
        pairs.extend(own.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())));
        if !has_lang {
            pairs.push((b"LANG", b"C.UTF-8"));
        }
        PackedEnvironment::pack(&pairs)
    }

    /// The user and the environment of the gateway, for the operator's `openclaw`.
    pub(crate) fn access_to(&self, gateway: &Service) -> (String, PackedEnvironment) {
        (gateway.user.clone(), self.environment(gateway.environment, &gateway.user))
    }
}

/// The lines, out of this process's memory: each is wiped when this returns.
fn sealed(specifications: Specifications) -> Vec<(&'static str, OwnedFd)> {
    let seal = |(name, line): (&'static str, Zeroizing<Vec<u8>>)| match memfd::sealed(c"specification", &line)
    {
        Ok(sealed) => Some((name, sealed)),
        // Without it each start of the service fails and says so.
        Err(why) => {
            tracing::error!("{name}: it cannot be given its specification: {why}");
            None
        }
    };
    specifications.into_iter().filter_map(seal).collect()
}

fn spec_of(probe: &Probe, eager: Duration, calm: Duration) -> ProbeSpec {
    let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    ProbeSpec { probe: probe.clone(), eager_ms: ms(eager), calm_ms: ms(calm), timeout_ms: ms(PROBE_TIMEOUT) }
}

/// By convention; the step that makes the account uses the same.
fn home_of(user: &str) -> String {
    if user == "root" { "/root".to_owned() } else { format!("/home/{user}") }
}

fn lines<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.collect::<Vec<_>>().join("\n")
}

/// Path to text as a JSON object. The text was UTF-8 when the configuration was checked.
fn packed_files(files: &WorkspaceFiles) -> PackedBytes {
    let map: BTreeMap<&str, &str> =
        files.iter().map(|(path, text)| (path, text.expose_str().unwrap_or_default())).collect();
    PackedBytes::pack(&line(&map))
}
