//! Streams of random numbers of a distillation: what is drawn of which.

/// A stream of random numbers, told apart from the others of a run by its number. Stored results depend on
/// these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// All that is drawn at an update of the student, those of the other networks included. Updates count from
    /// 0, to a thousand million.
    Update(u64),
    /// All that is drawn for updates of the fake score before the first of the student, of which so many are
    /// done.
    WarmUp(u64),
    /// The readout of a critic.
    Critic,
    /// The noise between the steps of a picture.
    Picture(u64),
    /// The noise of a file of pairs.
    Pairs(u64),
    /// All that a process draws, other than the first.
    Rank(u64),
    /// The size of the samples of a batch, by the number of batches before.
    Size(u64),
    /// New adapters.
    Adapters,
}

impl From<Stream> for u64 {
    fn from(stream: Stream) -> Self {
        const RANGE: u64 = 1_000_000_000;
        match stream {
            Stream::Update(update) => update,
            Stream::WarmUp(updates) => RANGE + updates,
            Stream::Critic => 2 * RANGE,
            Stream::Picture(index) => 3 * RANGE + index,
            Stream::Pairs(index) => 4 * RANGE + index,
            Stream::Rank(rank) => 5 * RANGE + rank,
            Stream::Size(batch) => 6 * RANGE + batch,
            Stream::Adapters => u64::MAX - 2,
        }
    }
}
