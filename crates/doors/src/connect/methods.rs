//! From a method's name and the bytes of a request to the bytes of an answer: decoding, who asks,
//! the call, counting and the audit line. The library around it does the three protocols.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use connectrpc::dispatcher::{
    Dispatcher, MethodDescriptor, RequestStream, StreamingResult, UnaryResult,
};
use connectrpc::{CodecFormat, ConnectError, Payload, RequestContext, Response};

use super::decode;
use super::proto::lodge::v1::WaitVmRequest;
use super::proto::vmprovisioner::v1::{
    BootVmRequest, DeleteVmRequest, GetVmInfoRequest, PauseVmRequest, RebootVmRequest,
    ResumeVmRequest, ShutdownVmRequest,
};
use super::tenants::Caller;
use super::{Door, Span};
use crate::control::Control;

const SERVICES: [&str; 2] = ["vmprovisioner.v1.VmService", "metal.vmprovisioner.v1.VmService"];
const OWN_SERVICE: &str = "lodge.v1.VmWatchService";

/// What can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    CreateVm,
    DeleteVm,
    BootVm,
    ShutdownVm,
    PauseVm,
    ResumeVm,
    RebootVm,
    GetVmInfo,
    ListVms,
    WaitVm,
    WatchVms,
}

impl Method {
    pub(super) const ALL: [(Method, &'static str); 11] = [
        (Method::CreateVm, "CreateVm"),
        (Method::DeleteVm, "DeleteVm"),
        (Method::BootVm, "BootVm"),
        (Method::ShutdownVm, "ShutdownVm"),
        (Method::PauseVm, "PauseVm"),
        (Method::ResumeVm, "ResumeVm"),
        (Method::RebootVm, "RebootVm"),
        (Method::GetVmInfo, "GetVmInfo"),
        (Method::ListVms, "ListVms"),
        (Method::WaitVm, "WaitVm"),
        (Method::WatchVms, "WatchVms"),
    ];

    /// By the path of its URL, with or without the slash before it.
    pub(super) fn of(path: &str) -> Option<Self> {
        let (service, name) = path.strip_prefix('/').unwrap_or(path).split_once('/')?;
        let (method, _) = Self::ALL.into_iter().find(|(_, known)| *known == name)?;
        let served = match method {
            Method::WaitVm | Method::WatchVms => service == OWN_SERVICE,
            _ => SERVICES.contains(&service),
        };
        served.then_some(method)
    }

    pub(super) fn is_service(path: &str) -> bool {
        let name = path.strip_prefix('/').unwrap_or(path);
        SERVICES.contains(&name) || name == OWN_SERVICE
    }

    pub(super) fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(m, _)| *m == self).map_or("", |(_, name)| name)
    }

    pub(super) const fn streams(self) -> bool {
        matches!(self, Method::WatchVms)
    }

    const fn mutates(self) -> bool {
        !matches!(self, Method::GetVmInfo | Method::ListVms | Method::WaitVm | Method::WatchVms)
    }
}

/// The door as the library calls it.
pub(super) struct Methods<C>(pub(super) Arc<Door<C>>);

impl<C: Control> Dispatcher for Methods<C> {
    fn lookup(&self, path: &str) -> Option<MethodDescriptor> {
        Method::of(path).map(|method| match method.streams() {
            true => MethodDescriptor::server_streaming(),
            false => MethodDescriptor::unary(false),
        })
    }

    fn call_unary(
        &self,
        path: &str,
        context: RequestContext,
        request: Payload,
        format: CodecFormat,
    ) -> UnaryResult {
        let (door, method) = (self.0.clone(), Method::of(path));
        Box::pin(async move {
            let method = method.ok_or_else(|| ConnectError::unimplemented("no such method"))?;
            let body = request.encoded()?;
            let begun = Instant::now();
            let mut about = About::of(&context);
            let result = call(&door, method, &context, &body, format, &mut about).await;
            door.finished(method, begun, &about, result.as_ref().err());
            Ok(Response::new(result?.into()))
        })
    }

    fn call_server_streaming(
        &self,
        path: &str,
        context: RequestContext,
        request: Bytes,
        format: CodecFormat,
    ) -> StreamingResult {
        let (door, method) = (self.0.clone(), Method::of(path));
        Box::pin(async move {
            if method != Some(Method::WatchVms) {
                return Err(ConnectError::unimplemented("no such method"));
            }
            let begun = Instant::now();
            let mut about = About::of(&context);
            let unknown = &mut about.unknown;
            let watched = super::watch::watch(&door, &context, &request, format, unknown).await;
            door.finished(Method::WatchVms, begun, &about, watched.as_ref().err());
            watched
        })
    }

    fn call_client_streaming(
        &self,
        _path: &str,
        _context: RequestContext,
        _requests: RequestStream,
        _format: CodecFormat,
    ) -> UnaryResult {
        Box::pin(async { Err(ConnectError::unimplemented("no method takes a stream")) })
    }

    fn call_bidi_streaming(
        &self,
        _path: &str,
        _context: RequestContext,
        _requests: RequestStream,
        _format: CodecFormat,
    ) -> StreamingResult {
        Box::pin(async { Err(ConnectError::unimplemented("no method takes a stream")) })
    }
}

/// Who asked about which machine, for the audit.
#[derive(Default)]
struct About {
    customer: String,
    vm_id: String,
    parent: Option<String>,
    unknown: decode::Unknown,
}

impl About {
    fn of(context: &RequestContext) -> Self {
        let parent = context.header("traceparent").and_then(|v| v.to_str().ok());
        Self { parent: parent.map(str::to_owned), ..Self::default() }
    }
}

/// The message is read before anybody is asked who they are, so that bad bytes are bad bytes.
async fn call<C: Control>(
    door: &Arc<Door<C>>,
    method: Method,
    context: &RequestContext,
    body: &[u8],
    format: CodecFormat,
    about: &mut About,
) -> Result<Bytes, ConnectError> {
    macro_rules! answer {
        ($call:ident, $request:ident) => {{
            let request: $request =
                decode::message(body, format, stringify!($request), &mut about.unknown)?;
            let caller = admit(door, context, about, &request.vm_id)?;
            decode::encode(&door.$call(&caller, request).await?, format)
        }};
    }
    match method {
        Method::CreateVm => {
            let request = decode::create(body, format, &mut about.unknown)?;
            let caller = admit(door, context, about, &request.vm_id)?;
            let response = door.create(&caller, request).await?;
            about.vm_id.clone_from(&response.vm_id);
            decode::encode(&response, format)
        }
        Method::DeleteVm => answer!(delete, DeleteVmRequest),
        Method::BootVm => answer!(boot, BootVmRequest),
        Method::ShutdownVm => answer!(shutdown, ShutdownVmRequest),
        Method::PauseVm => answer!(pause, PauseVmRequest),
        Method::ResumeVm => answer!(resume, ResumeVmRequest),
        Method::RebootVm => answer!(reboot, RebootVmRequest),
        Method::GetVmInfo => answer!(info, GetVmInfoRequest),
        Method::WaitVm => answer!(wait, WaitVmRequest),
        Method::ListVms => {
            let request = decode::message(body, format, "ListVmsRequest", &mut about.unknown)?;
            let caller = admit(door, context, about, "")?;
            decode::encode(&door.list(&caller, request).await?, format)
        }
        Method::WatchVms => Err(ConnectError::unimplemented("WatchVms answers with a stream")),
    }
}

fn admit<C>(
    door: &Arc<Door<C>>,
    context: &RequestContext,
    about: &mut About,
    vm_id: &str,
) -> Result<Caller, ConnectError> {
    about.vm_id = vm_id.to_owned();
    let caller = door.settings().tenants.caller(context.headers())?;
    about.customer = caller.name().to_owned();
    Ok(caller)
}

impl<C> Door<C> {
    fn finished(
        &self,
        method: Method,
        begun: Instant,
        about: &About,
        error: Option<&ConnectError>,
    ) {
        let settings = self.settings();
        let code = error.map_or("ok", |e| e.code.as_str());
        self.metrics.called(method.name(), code, begun.elapsed());
        if !about.unknown.is_empty() {
            let (name, keys) = (method.name(), &about.unknown);
            (settings.warn)(&format!("{name} was sent keys that mean nothing here: {keys:?}"));
        }
        if method.mutates() {
            let at = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
            let line = serde_json::json!({
                "at": at,
                "customer": about.customer,
                "call": method.name(),
                "vm_id": about.vm_id,
                "outcome": code,
            });
            (settings.audit)(&line.to_string());
        }
        (settings.trace)(Span {
            method: method.name(),
            parent: about.parent.clone(),
            took: begun.elapsed(),
            code,
            message: error.and_then(|e| e.message.clone()),
            vm_id: about.vm_id.clone(),
            customer: about.customer.clone(),
        });
    }
}
