use crate::entry::Entry;
use cvm_machine::description::Service;

pub(crate) fn entry() -> Entry {
    Entry::without_channel(Service {
        // Stops after the server that it replaces when that dies.
        stop_order: 8,
        ..Service::new("standin", "answers for the bucket mount if its server dies", &["cvm-standin"])
    })
}
