//! The four kinds of PATCH of a pod.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmpod_apiserver::fuzzing::patch(data));
