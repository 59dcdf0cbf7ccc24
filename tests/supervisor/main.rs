//! The supervisor as the real process 1 of a throw-away machine: services, boot, stop, control socket,
//! logs and secrets. The gateway and the storage worker are stand-ins of the test's choosing.

mod agent;
mod control;
mod logs;
mod plain;
mod secrets;
mod services;
mod storage_worker;
