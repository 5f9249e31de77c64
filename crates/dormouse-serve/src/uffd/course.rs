//! Where a guest goes: tells threads of it that go through memory in order, and how far ahead of them
//! pages are worth something.
//!
//! All of it is a guess. A wrong one costs time or memory, and never a byte.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use dormouse_live::pages::PAGE_BYTES;

/// Threads of a guest that are told apart; the one that was silent longest makes room.
const COURSES: usize = 4;

/// The most that is installed at once for a guest that goes in order. It takes as long as forty faults,
/// and a thread that waits for its last page waits so long.
const STEP_BYTES_MAX: u64 = 1 << 20;

/// A course counts for decoding from so many bytes on.
const COURSE_BYTES_MIN: u64 = 256 << 10;

/// How far ahead of a guest that goes in order the image is decoded, once it had to wait for that. All
/// courses together take an eighth of the standard cache of frames.
const DECODED_AHEAD_BYTES: u64 = 2 << 20;

/// The courses of a guest.
#[derive(Debug, Default)]
pub(super) struct Courses {
    /// Held for a look, and passed over when somebody else has it.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    list: [Course; COURSES],
    clock: u64,
}

/// A thread of a guest, as far as its faults show it.
#[derive(Clone, Copy, Debug, Default)]
struct Course {
    /// Where its first fault was and its last, and where the next one is if it goes in order.
    from: u64,
    at: u64,
    next: u64,
    /// Whether it came to pages that were not decoded.
    was_cold: bool,
    /// Up to here they were asked for.
    decoded_to: u64,
    last_used: u64,
}

/// What to look at for a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The bytes of the image around the fault that may be installed.
    pub(super) window: Range<u64>,
    /// Whether the guest comes from the page before; the window begins with the fault then.
    pub(super) is_in_order: bool,
    /// Where its fault before this one was, if it does; else this one.
    pub(super) passed_from: u64,
    course: Option<usize>,
}

impl Courses {
    /// A fault at a byte of the image that begins a page, with windows of `window_bytes`.
    pub(super) fn step(&self, at: u64, window_bytes: u64, image: &Range<u64>) -> Step {
        let window_bytes = window_bytes.max(PAGE_BYTES);
        let start = at / window_bytes * window_bytes;
        let around = start.max(image.start)..(start + window_bytes).min(image.end);
        let alone =
            |course| Step { window: around.clone(), is_in_order: false, passed_from: at, course };
        if window_bytes == PAGE_BYTES {
            return alone(None);
        }
        let Ok(mut state) = self.state.try_lock() else { return alone(None) };
        state.clock += 1;
        let now = state.clock;
        let goes_on = |course: &Course| course.last_used > 0 && course.next == at;
        if let Some(number) = state.list.iter().position(goes_on) {
            let course = &mut state.list[number];
            let passed_from = course.at;
            // No more than it has come through: where it stops, half is wanted at least.
            let step_bytes = (at - course.from).min(STEP_BYTES_MAX) / window_bytes * window_bytes;
            let end = (start + step_bytes.max(window_bytes)).min(image.end);
            *course = Course { at, next: end, last_used: now, ..*course };
            return Step { window: at..end, is_in_order: true, passed_from, course: Some(number) };
        }
        let oldest = (0..COURSES).min_by_key(|&number| state.list[number].last_used);
        if let Some(number) = oldest {
            state.list[number] =
                Course { from: at, at, next: around.end, last_used: now, ..Course::default() };
        }
        alone(oldest)
    }

    /// Notes that the pages of a step are there up to `next`, and no further. What to decode now, as
    /// the guest will come to it.
    pub(super) fn came_to(&self, step: &Step, next: u64, image: &Range<u64>) -> Option<Range<u64>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let course = &mut state.list[step.course?];
        if course.next != step.window.end {
            // Others have come since, or it has gone on.
            return None;
        }
        course.next = next;
        course.was_cold |= step.is_in_order && next < step.window.end;
        let passed = next.saturating_sub(course.from);
        if !course.was_cold || passed < COURSE_BYTES_MIN {
            return None;
        }
        let ahead_bytes = passed.min(DECODED_AHEAD_BYTES);
        let wanted = next.saturating_add(ahead_bytes).min(image.end);
        let from = course.decoded_to.max(next);
        if course.decoded_to >= next.saturating_add(ahead_bytes / 2) || from >= wanted {
            return None;
        }
        course.decoded_to = wanted;
        Some(from..wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 64 << 10;
    const IMAGE: Range<u64> = 0..64 << 20;

    /// A guest that finds all of each window installed.
    fn walk(courses: &Courses, from: u64, faults: usize) -> Vec<Step> {
        let mut at = from;
        let step = |_| {
            let step = courses.step(at, WINDOW, &IMAGE);
            assert_eq!(courses.came_to(&step, step.window.end, &IMAGE), None, "nothing is cold");
            at = step.window.end;
            step
        };
        (0..faults).map(step).collect()
    }

    #[test]
    fn steps_in_order_grow_and_join() {
        let steps = walk(&Courses::default(), 4096, 16);
        assert_eq!(steps[0].window, 0..WINDOW);
        assert!(!steps[0].is_in_order && steps[1..].iter().all(|step| step.is_in_order));
        for pair in steps.windows(2) {
            assert_eq!(pair[1].window.start, pair[0].window.end);
        }
        assert_eq!(steps[1].window, WINDOW..2 * WINDOW);
        assert_eq!(steps[3].window, 3 * WINDOW..5 * WINDOW);
        for step in &steps {
            let bytes = step.window.end - step.window.start;
            assert!(bytes <= (step.window.start).max(WINDOW) && bytes <= STEP_BYTES_MAX);
        }
        assert_eq!(steps[15].window.end - steps[15].window.start, STEP_BYTES_MAX);
        // All that it went through, without a gap: a trace is made of it.
        assert_eq!(steps[1].passed_from, 4096);
        assert_eq!(steps[2].passed_from, WINDOW);
    }

    #[test]
    fn threads_of_a_guest_are_told_apart() {
        let courses = Courses::default();
        let mut at = [0_u64, 16 << 20, 32 << 20];
        for round in 0..6 {
            for at in &mut at {
                let step = courses.step(*at, WINDOW, &IMAGE);
                assert_eq!(step.is_in_order, round > 0);
                *at = step.window.end;
            }
        }
    }

    #[test]
    fn a_guest_here_and_there_is_not_in_order() {
        let courses = Courses::default();
        let mut seed = 1_u64;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            let at = ((seed >> 20) % IMAGE.end) & !4095;
            let step = courses.step(at, WINDOW, &IMAGE);
            let start = at / WINDOW * WINDOW;
            assert!(step.is_in_order || step.window == (start..start + WINDOW), "{step:?}");
            assert!(step.window.contains(&at));
            assert_eq!(courses.came_to(&step, at + 4096, &IMAGE), None, "nothing to decode");
        }
    }

    /// What is not decoded ends a step early. The guest is in order all the same, and what it comes to
    /// is decoded before it does, once.
    #[test]
    fn ahead_of_a_guest_in_order_the_image_is_decoded_once() {
        let courses = Courses::default();
        let (mut at, mut decoded_to) = (0, None);
        for round in 0..200 {
            let step = courses.step(at, WINDOW, &IMAGE);
            assert_eq!(step.is_in_order, round > 0, "{step:?}");
            // As frames of 48 KiB lie.
            at = (at / 49_152 + 1) * 49_152;
            if let Some(ahead) = courses.came_to(&step, at, &IMAGE) {
                assert_eq!(ahead.start, decoded_to.unwrap_or(at), "twice, or not at all");
                assert!(ahead.end <= at + DECODED_AHEAD_BYTES);
                decoded_to = Some(ahead.end);
            }
            let is_long = at >= 2 * COURSE_BYTES_MIN;
            assert!(!is_long || decoded_to.is_some_and(|to| to >= at), "{decoded_to:?} at {at}");
        }
    }

    /// Runs of a few pages, here and there, lie in order too. Two megabytes were decoded ahead of each,
    /// and a guest that woke without a trace waited behind that.
    #[test]
    fn ahead_of_short_runs_nothing_is_decoded() {
        let courses = Courses::default();
        for run in 0..100_u64 {
            for page in 0..40 {
                let at = run * (37 << 12) * 3 + page * 4096;
                let step = courses.step(at, WINDOW, &IMAGE);
                assert_eq!(courses.came_to(&step, at + 4096, &IMAGE), None, "run {run}");
                assert!(step.window.end - step.window.start <= 3 * WINDOW);
            }
        }
    }

    #[test]
    fn nothing_is_beyond_the_region() {
        let courses = Courses::default();
        let image = 8192..WINDOW + 8192;
        let first = courses.step(8192, WINDOW, &image);
        assert_eq!(first.window, 8192..WINDOW);
        courses.came_to(&first, WINDOW, &image);
        let second = courses.step(WINDOW, WINDOW, &image);
        assert_eq!(second.window, WINDOW..WINDOW + 8192);
        let image = 0..1 << 20;
        let mut at = 0;
        while at < image.end {
            let step = courses.step(at, WINDOW, &image);
            assert!(step.window.end <= image.end);
            at += 4096;
            let ahead = courses.came_to(&step, at, &image);
            assert!(ahead.is_none_or(|ahead| ahead.end <= image.end && ahead.start >= at));
        }
    }
}
