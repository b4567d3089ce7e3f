//! The body of a create: JSON, YAML, protocol buffers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmpod_apiserver::fuzzing::body(data));
