//! Frames of Cloud Hypervisor's migration protocol: what is read is what is written, within its
//! bounds.
#![no_main]

use dormouse_vmm::cloud_hypervisor::offload::frame::{PageFault, Request, Response};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: [u8; 16]| {
    if let Ok(request) = Request::parse(&data) {
        assert_eq!(Request::parse(&request.to_bytes()).expect("it was one"), request);
    }
    if let Ok(response) = Response::parse(&data) {
        assert_eq!(Response::parse(&response.to_bytes()).expect("it was one"), response);
    }
    if let Ok(fault) = PageFault::parse(&data) {
        assert_eq!(fault.to_bytes(), data);
        assert!(fault.gpa.checked_add(fault.length).is_some());
    }
});
