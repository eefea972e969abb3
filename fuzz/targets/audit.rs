#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| byokd_fuzz::audit(bytes));
