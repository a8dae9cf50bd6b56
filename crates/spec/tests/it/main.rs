//! The language as its users meet it: documents in, machines or lists of problems out.

mod documents;
mod resolving;
