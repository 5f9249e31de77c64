//! The locks and atomics that requests, flushes and seals meet in.
//!
//! While this crate tests itself they are those of shuttle, which runs one thread at a time and
//! tries out at which of them another one may go on; see `overlay/orders.rs`.

#[cfg(not(test))]
pub(crate) use arc_swap::ArcSwap;
#[cfg(not(test))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
#[cfg(not(test))]
pub(crate) use std::sync::{Mutex, MutexGuard};

#[cfg(test)]
pub(crate) use explored::{ArcSwap, alone};
#[cfg(test)]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
#[cfg(test)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard};

#[cfg(test)]
mod explored {
    use std::sync::Arc;

    use shuttle::scheduler::RandomScheduler;
    use shuttle::{Config, MaxSteps, Runner};

    use super::Mutex;

    /// Runs a test that has one thread, for which shuttle's locks and atomics are like all others.
    pub(crate) fn alone(test: impl Fn() + Send + Sync + 'static) {
        let mut config = Config::new();
        config.stack_size = 1 << 20;
        config.max_steps = MaxSteps::None;
        Runner::new(RandomScheduler::new(1), config).run(test);
    }

    /// An [`arc_swap::ArcSwap`] that shuttle knows: each load and store is one step.
    #[derive(Debug)]
    pub(crate) struct ArcSwap<T>(Mutex<Arc<T>>);

    impl<T> ArcSwap<T> {
        pub(crate) fn from_pointee(value: T) -> ArcSwap<T> {
            ArcSwap(Mutex::new(Arc::new(value)))
        }

        pub(crate) fn load(&self) -> Arc<T> {
            Arc::clone(&self.0.lock().unwrap())
        }

        pub(crate) fn load_full(&self) -> Arc<T> {
            self.load()
        }

        pub(crate) fn store(&self, value: Arc<T>) {
            *self.0.lock().unwrap() = value;
        }
    }
}
