//! Requests of the Connect door: the first byte says in which form they are and what they ask for.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lodge_doors::connect::fuzz(bytes));
