//! The safetensors format: eight bytes with the header's length, a header in JSON, the tensors' bytes.
//!
//! Parsed here, because files come from strangers: every number is checked before it is used, and an
//! error names the tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tch::Kind;

/// Bytes of the header's length.
const PREFIX: usize = 8;
/// Longest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// What is wrong with a safetensors file, or with the index of several.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file is shorter than the length of a header.
    #[error("{bytes} bytes are too few for a safetensors file")]
    TooShort {
        /// Its length.
        bytes: usize,
    },
    /// The header is longer than the file, or than the format allows.
    #[error(
        "the header should have {header} bytes, but the file has {file} (cut short, or not safetensors?)"
    )]
    HeaderLength {
        /// The length that the file states.
        header: u64,
        /// The length of the file.
        file: usize,
    },
    /// The header is not the JSON that it should be.
    #[error("the header is not valid")]
    Header(#[source] serde_json::Error),
    /// The tensors do not end where the file does.
    #[error(
        "the header describes {described} bytes of tensors, but the file has {found} (cut short?)"
    )]
    DataLength {
        /// The end of the last tensor.
        described: u64,
        /// The bytes behind the header.
        found: u64,
    },
    /// A tensor overlaps the one before, leaves a gap, or ends before it begins.
    #[error("tensor {name} lies at bytes {begin}..{end}, but should begin at {expected}")]
    Place {
        /// The tensor.
        name: String,
        /// Its first byte behind the header.
        begin: u64,
        /// The byte behind its last.
        end: u64,
        /// Where the one before ends.
        expected: u64,
    },
    /// The bytes of a tensor are not as many as its shape needs.
    #[error("tensor {name}: shape {shape:?} of {dtype} does not fit {bytes} bytes")]
    Size {
        /// The tensor.
        name: String,
        /// The shape that the header states.
        shape: Vec<u64>,
        /// The dtype that it states.
        dtype: String,
        /// The bytes that it gives the tensor.
        bytes: u64,
    },
    /// A dtype that libtorch's kernels here do not take.
    #[error("tensor {name}: dtype {dtype} is not supported (F64, F32, F16, BF16 and integers are)")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: String,
    },
    /// An index names something that is not a file beside it.
    #[error("it names {shard:?}, which is not the name of a file beside it")]
    ShardName {
        /// The name.
        shard: String,
    },
    /// A file holds a tensor that the index puts elsewhere or does not know.
    #[error(
        "{shard} holds tensor {tensor}, but the index does not put tensor {tensor} into this file"
    )]
    NotListed {
        /// The tensor.
        tensor: String,
        /// The file.
        shard: String,
    },
    /// A file lacks a tensor that the index puts into it.
    #[error("it puts tensor {tensor} into {shard}, which lacks it")]
    Lacking {
        /// The tensor.
        tensor: String,
        /// The file.
        shard: String,
    },
    /// The place of a tensor is not one in this file.
    #[error("{entry:?} does not fit a file of {bytes} bytes")]
    Entry {
        /// The place.
        entry: Entry,
        /// The length of the file.
        bytes: usize,
    },
}

type Result<T> = std::result::Result<T, FormatError>;

/// What a file says about one tensor.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its element type.
    pub kind: Kind,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Where its bytes lie in the file: inside the file, and as many as kind and shape need.
    pub bytes: Range<usize>,
}

/// Texts by name, and tensors by name.
struct Header {
    metadata: Value,
    tensors: BTreeMap<String, Declared>,
}

/// Entry by entry: serde's `flatten` would keep the header a second time, many times as large.
impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Header, A::Error> {
                let mut header = Header { metadata: Value::Null, tensors: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else if let Some(_twice) = header.tensors.insert(name, map.next_value()?) {
                        return Err(A::Error::custom("a name is there twice"));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// More axes than libtorch takes in a tensor of any use.
const MOST_AXES: usize = 64;

/// At most [`MOST_AXES`], found before they are kept.
fn axes<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u64>, D::Error> {
    struct Axes;

    impl<'de> Visitor<'de> for Axes {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a shape of at most {MOST_AXES} axes")
        }

        fn visit_seq<A: SeqAccess<'de>>(
            self,
            mut axes: A,
        ) -> std::result::Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(axis) = axes.next_element()? {
                if shape.len() == MOST_AXES {
                    return Err(A::Error::invalid_length(shape.len() + 1, &self));
                }
                shape.push(axis);
            }
            Ok(shape)
        }
    }

    deserializer.deserialize_seq(Axes)
}

#[derive(Deserialize)]
struct Declared {
    dtype: String,
    #[serde(deserialize_with = "axes")]
    shape: Vec<u64>,
    /// Begin and end, counted from the end of the header.
    data_offsets: [u64; 2],
}

/// A parsed header.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) tensors: BTreeMap<String, Entry>,
    /// Texts by name, where the file has any.
    pub(super) metadata: Value,
}

/// The tensors of a file by name, and what else its header says.
///
/// # Errors
/// If the header is broken, a dtype is not supported, or the tensors do not fill the file exactly, one
/// after the other, as the format demands.
pub(super) fn parse(file: &[u8]) -> Result<Contents> {
    let prefix = file.first_chunk::<PREFIX>().ok_or(FormatError::TooShort { bytes: file.len() })?;
    let length = u64::from_le_bytes(*prefix);
    if length > LONGEST_HEADER || length > (file.len() - PREFIX) as u64 {
        return Err(FormatError::HeaderLength { header: length, file: file.len() });
    }
    let start = PREFIX + length as usize;
    let header: Header =
        serde_json::from_slice(&file[PREFIX..start]).map_err(FormatError::Header)?;
    let found = (file.len() - start) as u64;
    let described = header.tensors.values().map(|tensor| tensor.data_offsets[1]).max().unwrap_or(0);
    if described != found {
        return Err(FormatError::DataLength { described, found });
    }

    let mut tensors: Vec<_> = header.tensors.into_iter().collect();
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut expected = 0;
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let [begin, end] = tensor.data_offsets;
            if begin != expected || begin > end {
                return Err(FormatError::Place { name, begin, end, expected });
            }
            expected = end;
            let entry = entry(&name, tensor, start)?;
            Ok((name, entry))
        })
        .collect::<Result<_>>()?;
    Ok(Contents { tensors, metadata: header.metadata })
}

/// Checks kind and shape against the number of bytes, which is known to lie in the file.
fn entry(name: &str, tensor: Declared, start: usize) -> Result<Entry> {
    let Declared { dtype, shape, data_offsets: [begin, end] } = tensor;
    let Some(kind) = kind(&dtype) else {
        return Err(FormatError::Dtype { name: name.to_owned(), dtype });
    };
    // An axis of length zero must not hide an overflow of the others, which libtorch multiplies too.
    let largest = shape.iter().try_fold(kind.elt_size_in_bytes() as u64, |product, axis| {
        product.checked_mul((*axis).max(1)).filter(|bytes| *bytes <= i64::MAX as u64)
    });
    let needed = if shape.contains(&0) { largest.map(|_| 0) } else { largest };
    if needed != Some(end - begin) {
        return Err(FormatError::Size { name: name.to_owned(), shape, dtype, bytes: end - begin });
    }
    Ok(Entry {
        kind,
        shape: shape.iter().map(|axis| *axis as i64).collect(),
        bytes: start + begin as usize..start + end as usize,
    })
}

fn kind(dtype: &str) -> Option<Kind> {
    Some(match dtype {
        "F64" => Kind::Double,
        "F32" => Kind::Float,
        "F16" => Kind::Half,
        "BF16" => Kind::BFloat16,
        "I64" => Kind::Int64,
        "I32" => Kind::Int,
        "I16" => Kind::Int16,
        "I8" => Kind::Int8,
        "U8" => Kind::Uint8,
        _ => return None,
    })
}
