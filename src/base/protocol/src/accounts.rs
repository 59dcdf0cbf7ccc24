//! Reads accounts from the text of `/etc/passwd` and `/etc/group`.
//!
//! The binaries are static, and a static C library cannot load the modules of the name service
//! switch, so `getpwnam` would fail or worse. Inside a container no other source of accounts exists than the two
//! files.
//!
//! The caller reads the files. An incomplete line is no account.

use std::ops::RangeInclusive;

/// User and group number of the gateway's account, if we create it: the same in every container, so that a volume's
/// files have the same owner in the next one. Files may get this owner before the account exists.
pub const GATEWAY_ID: u32 = 990;

/// The user that the mux client becomes once it has opened what only root may open. It is not the gateway's user,
/// whom the agent runs as and who must not reach the register key.
pub const MUX_UID: u32 = 18_790;

/// Numbers for the gateway's account, if [`GATEWAY_ID`] is taken.
pub const MADE_IDS: RangeInclusive<u32> = 1000..=1999;

/// User numbers of people. Lower and higher ones are system accounts (Debian's policy, 9.2.2).
const PEOPLE: RangeInclusive<u32> = 1000..=59_999;

/// Numbers of users and groups inside the agent's containers, except their root, which is mapped to the agent.
pub const CONTAINER_IDS: RangeInclusive<u32> = 200_001..=265_535;

/// The user that a process can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Every group of the account once, its own first.
    pub groups: Vec<u32>,
    pub home: String,
}

impl Account {
    /// The account `name`, from the text of `/etc/passwd` and `/etc/group`. If a name has several lines the first one
    /// is used, as by the C library.
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

    /// Why the agent must not be this account, as the rest of a sentence; none if it may be.
    pub fn unfit_for_the_agent(&self) -> Option<&'static str> {
        match self.uid {
            0 => Some("has the number of root"),
            MUX_UID => Some("is the mux client's, which holds the key of the mux-server"),
            uid if uid != GATEWAY_ID && !PEOPLE.contains(&uid) => {
                Some("is a system's own: what belongs to that service would be the agent's")
            }
            _ if self.groups.contains(&0) => Some("is in the group root"),
            _ => None,
        }
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
    fn the_agent_is_neither_root_nor_a_system_account_nor_one_of_ours() {
        let unfit = |uid, groups: &[u32]| {
            let account = Account { uid, gid: groups[0], groups: groups.into(), home: "/".into() };
            account.unfit_for_the_agent()
        };
        for uid in [GATEWAY_ID, 1000, 59_999] {
            assert_eq!(unfit(uid, &[uid, 998]), None, "{uid}");
        }
        for uid in [0, 1, 33, 102, 989, 991, 999, MUX_UID, 60_000, 65_534, 200_001] {
            assert!(unfit(uid, &[uid]).is_some(), "{uid}");
        }
        assert!(unfit(1000, &[0]).is_some() && unfit(1000, &[1000, 0]).is_some());
        assert!(MADE_IDS.clone().all(|id| PEOPLE.contains(&id)) && !MADE_IDS.contains(&MUX_UID));
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
