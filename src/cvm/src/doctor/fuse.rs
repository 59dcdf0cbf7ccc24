//! Can FUSE be used? Only the S3 mode needs it, and falls back to sync without.
//!
//! May import: `finding`, `words`.

use super::finding::{Notebook, Outcome, ok, warn};
use crate::words;
use nix::errno::Errno;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

const DEVICE: &str = "/dev/fuse";
const CONSEQUENCE: &str = "without it the S3 mode falls back to sync";

pub(crate) fn check(notebook: &mut Notebook<'_>) {
    notebook.check(DEVICE, || judge(Path::new(DEVICE)));
}

fn judge(device: &Path) -> Outcome {
    let compose = "in docker-compose.yml: devices: [/dev/fuse]";
    match device.metadata() {
        Ok(data) if data.file_type().is_char_device() => {}
        Ok(_) => return warn(format!("it is no device; {CONSEQUENCE}"), compose),
        Err(error) => return warn(format!("{}; {CONSEQUENCE}", words::of_io(&error)), compose),
    }
    let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open(device) else {
        return ok("it opens");
    };
    let found = format!("it does not open: {}; {CONSEQUENCE}", words::of_io(&error));
    let remedy = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENODEV | Errno::ENXIO) => "load the kernel's module on the host: modprobe fuse",
        _ => compose,
    };
    warn(found, remedy)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn an_absent_device_and_a_file_in_its_place_are_told_with_the_line_for_compose() {
        for place in ["/no/such/device", "/etc/passwd"] {
            let outcome = judge(Path::new(place));
            assert_eq!(outcome.verdict, Verdict::Warn);
            assert!(outcome.remedy.unwrap().contains("devices: [/dev/fuse]"));
        }
        assert_eq!(judge(Path::new("/dev/null")).verdict, Verdict::Ok);
    }
}
