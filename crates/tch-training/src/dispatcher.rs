//! Operators that `tch` leaves out, called through libtorch's stable C dispatcher.
//!
//! The functions below are safe: they check what the kernels take on trust.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use tch::{TchError, Tensor};

use crate::error::{Error, Result};

unsafe extern "C" {
    fn torch_call_dispatcher(
        name: *const c_char,
        overload: *const c_char,
        stack: *mut u64,
        abi_version: u64,
    ) -> i32;
    fn aoti_torch_abi_version() -> u64;
    fn aoti_torch_new_tensor_handle(tensor: *mut c_void, handle: *mut *mut c_void) -> i32;
    fn torch_new_list_reserve_size(size: usize, list: *mut *mut c_void) -> i32;
    fn torch_list_push_back(list: *mut c_void, value: u64) -> i32;
    fn torch_new_stable_ivalue(value: *mut *mut u64) -> i32;
    fn torch_exception_get_what_without_backtrace() -> *const c_char;
}

/// Numbers of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWStep {
    pub(crate) learning_rate: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
}

/// The tensors of one parameter in an update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments<'a> {
    pub(crate) parameter: &'a Tensor,
    pub(crate) gradient: &'a Tensor,
    pub(crate) first: &'a Tensor,
    pub(crate) second: &'a Tensor,
    /// A float32 scalar, already advanced.
    pub(crate) step: &'a Tensor,
}

/// `aten::_fused_adamw_`: updates parameters and moments in place, unless `is_bad`, a float32 scalar, is 1.
///
/// # Errors
/// [`Error::Shape`] if tensors of one parameter differ in shape, or `is_bad` is no scalar; [`Error::Torch`] if libtorch
/// refuses them.
pub(crate) fn fused_adamw(
    slots: &[Moments<'_>],
    numbers: AdamWStep,
    is_bad: &Tensor,
) -> Result<()> {
    same_shape("is_bad", &[], is_bad)?;
    for slot in slots {
        let size = slot.parameter.size();
        same_shape("gradient", &size, slot.gradient)?;
        same_shape("first moment", &size, slot.first)?;
        same_shape("second moment", &size, slot.second)?;
        same_shape("step count", &[], slot.step)?;
    }
    if slots.is_empty() {
        return Ok(());
    }
    let mut stack = [
        tensor_list(slots.iter().map(|slot| slot.parameter))?,
        tensor_list(slots.iter().map(|slot| slot.gradient))?,
        tensor_list(slots.iter().map(|slot| slot.first))?,
        tensor_list(slots.iter().map(|slot| slot.second))?,
        tensor_list(std::iter::empty())?,
        tensor_list(slots.iter().map(|slot| slot.step))?,
        numbers.learning_rate.to_bits(),
        numbers.betas.0.to_bits(),
        numbers.betas.1.to_bits(),
        numbers.weight_decay.to_bits(),
        numbers.eps.to_bits(),
        0, // amsgrad
        0, // maximize
        0, // grad_scale: none
        some(tensor_handle(is_bad)?)?,
    ];
    call(c"aten::_fused_adamw_", c"", &mut stack)
}

/// `aten::_foreach_mul_.Tensor`: multiplies every tensor by a scalar tensor in place.
///
/// # Errors
/// [`Error::Shape`] if `factor` is not a scalar tensor.
pub(crate) fn multiply_all(tensors: &[&Tensor], factor: &Tensor) -> Result<()> {
    same_shape("factor", &[], factor)?;
    if tensors.is_empty() {
        return Ok(());
    }
    let mut stack = [tensor_list(tensors.iter().copied())?, tensor_handle(factor)?];
    call(c"aten::_foreach_mul_", c"Tensor", &mut stack)
}

/// `aten::_foreach_zero_`: sets every tensor to zero in place.
///
/// # Errors
/// [`Error::Torch`] if libtorch refuses a tensor.
pub(crate) fn zero_all(tensors: &[&Tensor]) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    call(c"aten::_foreach_zero_", c"", &mut [tensor_list(tensors.iter().copied())?])
}

/// `aten::_backward`: adds to the `grad` of every leaf that `output` depends on, from the gradient in
/// `output`, or from 1 if it is a scalar. With [`Graph::Kept`], the graph can be passed again.
///
/// # Errors
/// [`Error::Shape`] if `gradient` does not have the shape of `output`, [`Error::Torch`] if `output` requires no
/// gradient.
pub(crate) fn backward(output: &Tensor, gradient: Option<&Tensor>, graph: Graph) -> Result<()> {
    same_shape("output", &gradient.map_or_else(Vec::new, Tensor::size), output)?;
    let gradient = match gradient {
        None => 0,
        Some(gradient) => some(tensor_handle(gradient)?)?,
    };
    let mut stack = [
        tensor_handle(output)?,
        tensor_list(std::iter::empty())?, // inputs: all leaves
        gradient,
        some(u64::from(graph == Graph::Kept))?,
        0, // create_graph
    ];
    call(c"aten::_backward", c"", &mut stack)
}

/// What becomes of a graph that a backward pass has gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Graph {
    Kept,
    Freed,
}

fn same_shape(what: &'static str, expected: &[i64], tensor: &Tensor) -> Result<()> {
    let found = tensor.size();
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected.to_vec(), found })
}

/// Calls an operator. The stack holds every argument of its schema, whose handles the call takes over.
fn call(name: &CStr, overload: &CStr, stack: &mut [u64]) -> Result<()> {
    // Operators update leaves in place here, which autograd would refuse.
    let _guard = tch::no_grad_guard();
    // SAFETY: the callers in this file push all arguments of the schema in order, each in the
    // encoding of the ABI, and the operators return at most as many values as they take.
    check(unsafe {
        torch_call_dispatcher(
            name.as_ptr(),
            overload.as_ptr(),
            stack.as_mut_ptr(),
            aoti_torch_abi_version(),
        )
    })
}

/// A new handle on a tensor, as a stack slot.
fn tensor_handle(tensor: &Tensor) -> Result<u64> {
    if !tensor.defined() {
        return Err(refusal("an undefined tensor cannot be passed to an operator"));
    }
    let mut handle = std::ptr::null_mut();
    // SAFETY: a defined `Tensor` holds a live `at::Tensor`, which the call copies (sharing storage).
    check(unsafe {
        aoti_torch_new_tensor_handle(tensor.as_ptr().cast_mut().cast(), &raw mut handle)
    })?;
    Ok(handle as u64)
}

/// A list of tensor handles, as a stack slot.
fn tensor_list<'a>(tensors: impl ExactSizeIterator<Item = &'a Tensor>) -> Result<u64> {
    let mut list = std::ptr::null_mut();
    // SAFETY: writes a new list to a valid place.
    check(unsafe { torch_new_list_reserve_size(tensors.len(), &raw mut list) })?;
    for tensor in tensors {
        let handle = tensor_handle(tensor)?;
        // SAFETY: `list` is the list made above and takes over the handle.
        check(unsafe { torch_list_push_back(list, handle) })?;
    }
    Ok(list as u64)
}

/// A present optional value, as a stack slot.
fn some(value: u64) -> Result<u64> {
    let mut slot = std::ptr::null_mut();
    // SAFETY: writes a pointer to a new slot to a valid place.
    check(unsafe { torch_new_stable_ivalue(&raw mut slot) })?;
    if slot.is_null() {
        return Err(refusal("no slot for an optional value was made"));
    }
    // SAFETY: the slot is ours until an operator takes it over.
    unsafe { slot.write(value) };
    Ok(slot as u64)
}

fn check(code: i32) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: after a failed call this is a C string that stays until the next call on this thread.
    let text = unsafe {
        let what = torch_exception_get_what_without_backtrace();
        if what.is_null() { c"no message" } else { CStr::from_ptr(what) }
    };
    Err(refusal(&text.to_string_lossy()))
}

fn refusal(text: &str) -> Error {
    TchError::Torch(text.to_owned()).into()
}
