//! What is counted of under stores in this process.

use forebay_common::counter;

counter!(pub BYTES_READ, "forebay_ufs_read_bytes_total", "bytes read from under stores");
counter!(pub BYTES_WRITTEN, "forebay_ufs_written_bytes_total", "bytes written to under stores");
counter!(pub CALLS, "forebay_ufs_calls_total", "calls to under stores, retries not counted");
counter!(pub ERRORS, "forebay_ufs_errors_total", "calls to under stores that failed for good; a missing object is no failure");
counter!(pub RETRIES, "forebay_ufs_retries_total", "calls to under stores that were tried again");
counter!(pub CHANGED, "forebay_ufs_changed_total", "reads that met another version than the one opened");
