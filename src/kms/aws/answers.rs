//! Answers that have come, by their request ids: one that comes a second time, from a cache or by a
//! replay, proves nothing. All clients of a daemon share them, for what was answered to one role may
//! be replayed to another.

use std::collections::hash_map::RandomState;
use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

/// Answers that are remembered: some minutes of a node that asks as fast as it may, hours of one with
/// a hundred volumes, in 2 MiB.
const REMEMBERED: usize = 1 << 16;

/// The latest answers.
#[derive(Default)]
pub struct Answers {
    hasher: RandomState,
    came: Mutex<Came>,
}

/// Hashes of request ids, all and in the order in which they came.
#[derive(Default)]
struct Came {
    all: HashSet<u64>,
    oldest_first: VecDeque<u64>,
}

impl Answers {
    /// Whether an answer with this request id came before; it is remembered.
    pub(super) fn came_before(&self, id: &str) -> bool {
        let id = self.hasher.hash_one(id);
        let mut came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        if !came.all.insert(id) {
            return true;
        }
        came.oldest_first.push_back(id);
        if came.oldest_first.len() > REMEMBERED
            && let Some(oldest) = came.oldest_first.pop_front()
        {
            came.all.remove(&oldest);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_again_after_five_minutes_of_a_busy_node() {
        let answers = Answers::default();
        let id = |n: usize| format!("id-{n}");
        let busy = 200 * 300;
        assert!((0..busy).all(|n| !answers.came_before(&id(n))));
        assert!((0..busy).all(|n| answers.came_before(&id(n))));
        assert!((busy..2 * REMEMBERED).all(|n| !answers.came_before(&id(n))));
        assert_eq!(answers.came.lock().unwrap().all.len(), REMEMBERED, "in bounded memory");
    }
}
