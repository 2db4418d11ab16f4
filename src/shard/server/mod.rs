//! Clients' doors.
