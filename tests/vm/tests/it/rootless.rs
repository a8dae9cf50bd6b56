//! The same without root: a user's own instance, confined and connected.
