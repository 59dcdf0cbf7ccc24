//! Accounts, as `/etc/passwd` and `/etc/group` describe them.
//!
//! The binaries are static, and a static C library cannot load the modules of the name service
//! switch; `getpwnam` would fail or worse. The two files are the whole truth inside a container.
//!
//! Refuses to read the files itself, and to guess: a line that is not whole is no account.
//! Imports nothing.

/// User and group number of an account that is made here: the same in every container, so that a
/// volume's files have the same owner in the next. Also what they will be before it is made.
pub const GATEWAY_ID: u32 = 990;

/// Who a process can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Every group the account is in, its own first, none twice.
    pub groups: Vec<u32>,
    pub home: String,
}

impl Account {
    /// The account `name`, from the text of `/etc/passwd` and `/etc/group`. The first line of a
    /// name counts, as it does for the C library.
    pub fn find(passwd: &str, group: &str, name: &str) -> Option<Self> {
        let (uid, gid, home) = passwd.lines().find_map(|line| user(line, name))?;
        let mut groups = vec![gid];
        for extra in group.lines().filter_map(|line| membership(line, name)) {
            if !groups.contains(&extra) {
                groups.push(extra);
            }
        }
        Some(Self { uid, gid, groups, home })
    }
}

/// The number of the group `name`, from the text of `/etc/group`.
pub fn group_id(group: &str, name: &str) -> Option<u32> {
    group.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        fields.nth(1)?.parse().ok()
    })
}

/// `name:password:uid:gid:comment:home:shell`
fn user(line: &str, name: &str) -> Option<(u32, u32, String)> {
    let fields: Vec<&str> = line.split(':').collect();
    let [own_name, _, uid, gid, _, home, _] = fields[..] else { return None };
    (own_name == name && !name.is_empty()).then_some(())?;
    // An empty home is the root directory to login(1); to us it is a damaged line.
    home.starts_with('/').then_some(())?;
    Some((uid.parse().ok()?, gid.parse().ok()?, home.to_owned()))
}

/// `name:password:gid:member,member`: the number, if `name` is a member.
fn membership(line: &str, name: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    fields.next()?.split(',').any(|member| member == name).then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # a comment\n\
        openclaw:x:990:990::/home/openclaw:/bin/bash\n\
        broken:x:12\n\
        nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n\
        huge:x:4294967296:1::/:/bin/sh\n\
        openclaw:x:1:1::/second:/bin/sh\n";
    const GROUP: &str = "root:x:0:\n\
        docker:x:998:alice,openclaw\n\
        dockers:x:997:openclawer\n\
        openclaw:x:990:openclaw\n\
        broken:x\n";

    #[test]
    fn an_account_has_its_own_group_first_and_each_group_once() {
        let account = Account::find(PASSWD, GROUP, "openclaw").unwrap();
        let expected = Account { uid: 990, gid: 990, groups: vec![990, 998], home: "/home/openclaw".into() };
        assert_eq!(account, expected);
    }

    #[test]
    fn root_has_no_more_groups_than_its_own() {
        assert_eq!(Account::find(PASSWD, GROUP, "root").unwrap().groups, [0]);
    }

    #[test]
    fn what_is_not_a_whole_line_is_no_account() {
        for name in ["broken", "huge", "open", "", "# a comment", "absent"] {
            assert_eq!(Account::find(PASSWD, GROUP, name), None, "{name}");
        }
    }

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        assert_eq!(group_id(GROUP, "docker"), Some(998));
        assert_eq!(group_id(GROUP, "dock"), None);
        assert_eq!(group_id(GROUP, "broken"), None);
    }
}
