//! Operators that `tch` leaves out, called through libtorch's stable C dispatcher.
//!
//! The functions below are safe: they check what the kernels take on trust.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Result, bail, ensure};
use tch::Tensor;

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
pub struct AdamWStep {
    pub learning_rate: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
}

/// `aten::_fused_adamw_`: updates parameters and moments in place. `steps` are float32 scalars that
/// the caller has already advanced.
///
/// # Errors
/// If the lists differ in length or shape, or libtorch refuses them.
pub fn fused_adamw(
    parameters: &[&Tensor],
    gradients: &[&Tensor],
    first_moments: &[&Tensor],
    second_moments: &[&Tensor],
    steps: &[&Tensor],
    numbers: AdamWStep,
) -> Result<()> {
    for list in [gradients, first_moments, second_moments] {
        ensure!(
            list.len() == parameters.len()
                && list.iter().zip(parameters).all(|(a, b)| a.size() == b.size()),
            "parameters, gradients and moments must have the same shapes"
        );
    }
    ensure!(
        steps.len() == parameters.len() && steps.iter().all(|step| step.numel() == 1),
        "there must be one step count for each parameter"
    );
    if parameters.is_empty() {
        return Ok(());
    }
    let mut stack = [
        tensor_list(parameters)?,
        tensor_list(gradients)?,
        tensor_list(first_moments)?,
        tensor_list(second_moments)?,
        tensor_list(&[])?,
        tensor_list(steps)?,
        numbers.learning_rate.to_bits(),
        numbers.betas.0.to_bits(),
        numbers.betas.1.to_bits(),
        numbers.weight_decay.to_bits(),
        numbers.eps.to_bits(),
        0, // amsgrad
        0, // maximize
        0, // grad_scale: none
        0, // found_inf: none
    ];
    call(c"aten::_fused_adamw_", c"", &mut stack)
}

/// `aten::_foreach_mul_.Tensor`: multiplies every tensor by a scalar tensor in place.
///
/// # Errors
/// If `factor` is not a scalar tensor.
pub fn multiply_all(tensors: &[&Tensor], factor: &Tensor) -> Result<()> {
    ensure!(factor.numel() == 1, "the factor must hold one number");
    if tensors.is_empty() {
        return Ok(());
    }
    let mut stack = [tensor_list(tensors)?, tensor_handle(factor)?];
    call(c"aten::_foreach_mul_", c"Tensor", &mut stack)
}

/// `aten::_backward`: adds to the `grad` of every leaf that `output` depends on, from the gradient in
/// `output`, or from 1 if it is a scalar. With `retain`, the graph can be passed again.
///
/// # Errors
/// If `gradient` does not have the shape of `output`, or `output` requires no gradient.
pub fn backward(output: &Tensor, gradient: Option<&Tensor>, retain: bool) -> Result<()> {
    let size = gradient.map_or_else(Vec::new, Tensor::size);
    ensure!(
        output.size() == size,
        "the gradient of an output {:?} must have its shape, found {size:?}",
        output.size()
    );
    let gradient = match gradient {
        None => 0,
        Some(gradient) => some(tensor_handle(gradient)?)?,
    };
    let mut stack = [
        tensor_handle(output)?,
        tensor_list(&[])?, // inputs: all leaves
        gradient,
        some(u64::from(retain))?,
        0, // create_graph
    ];
    call(c"aten::_backward", c"", &mut stack)
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
    ensure!(tensor.defined(), "an undefined tensor cannot be passed to an operator");
    let mut handle = std::ptr::null_mut();
    // SAFETY: a defined `Tensor` holds a live `at::Tensor`, which the call copies (sharing storage).
    check(unsafe {
        aoti_torch_new_tensor_handle(tensor.as_ptr().cast_mut().cast(), &raw mut handle)
    })?;
    Ok(handle as u64)
}

/// A list of tensor handles, as a stack slot.
fn tensor_list(tensors: &[&Tensor]) -> Result<u64> {
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
    ensure!(!slot.is_null(), "libtorch made no slot for an optional value");
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
    bail!("libtorch: {}", text.to_string_lossy())
}
