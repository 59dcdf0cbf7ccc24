//! The supervisor as the real process 1 of a throw-away machine: boot, services, stop, control socket, logs and
//! secrets, with real sshd and dockerd. The gateway and the storage worker are scripts of a test's choosing.

mod agent;
mod boot;
mod control;
mod docker;
mod fixtures;
mod logs;
mod plain;
mod restarts;
mod secrets;
mod stopping;
mod storage_worker;
