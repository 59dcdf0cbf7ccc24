//! Files of /proc and /sys, and pure readers of their text.
//!
//! By hand, because a diagnosis shows what it can: of a table with one line that it does not expect the crate `procfs`
//! reads nothing, and it leaves a space in the name of a mount point as `\040`.
//!
//! By hand, because a doctor reads what a broken kernel or container shows: the readers of `procfs` give up
//! on a whole file for one line that they do not know, and leave blanks in paths as `\040`.

pub(crate) fn read(path: &str) -> Option<String> {
    std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The number of a line `Name:  123 kB` or `name 123`.
pub(crate) fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix(':').or_else(|| rest.strip_prefix(' '))?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// One line of /proc/PID/mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub point: String,
    pub kind: String,
    pub read_only: bool,
    /// Set-user-ID bits and devices have no effect on it.
    pub lends_no_rights: bool,
}

/// The mounts in the order in which they were made; the last one at a mount point is the visible one.
pub(crate) fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let options: Vec<&str> = left.get(5)?.split(',').collect();
        Some(Mount {
            point: unescaped(left.get(4)?),
            kind: right.split(' ').next()?.to_owned(),
            read_only: options.contains(&"ro"),
            lends_no_rights: options.contains(&"nosuid") && options.contains(&"nodev"),
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// The kernel writes blanks and line breaks as `\040`.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = if *first == b'\\' { tail.get(..3) } else { None };
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_and_without_optional_fields() {
        let text = "\
22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/a - b
30 22 254:1 /data /data rw,noatime shared:1 master:2 - ext4 /dev/vda1 rw
31 22 0:40 / /with\\040blank ro - tmpfs tmpfs rw
broken line
";
        let mounts = mounts(text);
        let told: Vec<(&str, &str, bool)> =
            mounts.iter().map(|m| (m.point.as_str(), m.kind.as_str(), m.read_only)).collect();
        assert_eq!(told, [("/", "overlay", false), ("/data", "ext4", false), ("/with blank", "tmpfs", true)]);
    }

    #[test]
    fn a_number_is_found_by_its_whole_name() {
        assert_eq!(number("MemTotal:  16 kB\nMemAvailable:   12 kB\n", "MemAvailable"), Some(12));
        assert_eq!(number("oom_kill_x 1\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(number("", "oom_kill"), None);
    }
}
