//! Tests of the built programs with the clients people use.
