//! Keeps keys out of the swap, where the system allows it.
//!
//! Locks belong to the process and to pages, and so does the record of them: this is the only state
//! that does not belong to an instance.
//!
//! Nothing is ever unlocked. Locks do not nest, so unlocking the page of one key would unlock the
//! keys beside it. A page that held a key stays locked until it is given back to the system, which
//! ends its lock; and because the heap puts new keys where old ones were, the number of locked
//! pages stays small.

use std::{
    collections::BTreeSet,
    mem, ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// The largest number of locked pages, usually 32 MiB of them: each may split a mapping in three,
/// and Linux gives a process 65,530 mappings (vm.max_map_count), which other memory needs too.
const MAX_PAGES: usize = 8_192;

static PAGES: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
static NOT_LOCKED: AtomicU64 = AtomicU64::new(0);

/// The number of keys of this process that the system did not lock into memory.
#[must_use]
pub fn keys_not_locked() -> u64 {
    NOT_LOCKED.load(Ordering::Relaxed)
}

/// Asks the system to keep the pages of a key in memory. The key must not move
/// afterwards: it belongs in a box. A refusal is counted, and the first is logged; the
/// key works as well without.
pub(super) fn lock_in_memory<T: ?Sized>(key: &T) {
    let (address, length) = (ptr::from_ref(key).cast::<u8>(), mem::size_of_val(key));
    let refused = |reason: &dyn std::fmt::Display| {
        if NOT_LOCKED.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                %reason,
                "keys are not locked into memory and may reach the swap; \
                 raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= of systemd) or encrypt the swap"
            );
        }
    };
    let page = region::page::size();
    let first = address.addr() / page;
    let last = (address.addr() + length.max(1) - 1) / page;
    let mut pages = PAGES.lock().unwrap_or_else(PoisonError::into_inner);
    let new = (first..=last).filter(|page| !pages.contains(page)).count();
    if pages.len() + new > MAX_PAGES {
        return refused(&"enough pages are locked");
    }
    // A known page is locked again: it may have been given back in between.
    match region::lock(address, length) {
        Ok(guard) => {
            pages.extend(first..=last);
            // The guard would unlock the whole page, and other keys with it.
            mem::forget(guard);
        }
        Err(error) => refused(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_share_a_page_take_one_lock() {
        let keys = vec![[7_u8; 32]; 1000].into_boxed_slice();
        for key in &keys {
            lock_in_memory(key);
        }
        let pages = PAGES.lock().unwrap();
        let page = keys[500].as_ptr().addr() / region::page::size();
        assert!(pages.contains(&page) || keys_not_locked() > 0);
        assert!(pages.len() < 1000, "{}", pages.len());
    }
}
