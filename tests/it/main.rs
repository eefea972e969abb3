//! Tests of the built programs, with the clients people use.

mod support;

mod clients;
mod volumes;
