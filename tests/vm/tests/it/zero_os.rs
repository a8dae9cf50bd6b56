//! Machines from flists, and the Zero-OS door.

mod clients;
mod debian;
mod door;
mod roots;
mod tools;
