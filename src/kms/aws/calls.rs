//! Every request that is sent to KMS, told to whoever keeps account of them: each attempt, also
//! those that the SDK makes again by itself, since the customer's CloudTrail has each of them too.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_kms::config::interceptors::{
    BeforeSerializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
    FinalizerInterceptorContextRef,
};
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_kms::error::ProvideErrorMetadata;
use aws_sdk_kms::operation::decrypt::{DecryptError, DecryptInput};
use aws_sdk_kms::operation::describe_key::{DescribeKeyError, DescribeKeyInput};
use aws_sdk_kms::operation::generate_data_key::{GenerateDataKeyError, GenerateDataKeyInput};
use aws_sdk_kms::operation::re_encrypt::{ReEncryptError, ReEncryptInput};
use aws_smithy_types::config_bag::{Storable, StoreReplace};

use crate::key::wrapped::{EncryptionContext, KeyArn};
use crate::kms::{Call, Observer, Operation};

/// Tells the observer.
#[derive(Clone)]
pub(super) struct Calls(pub(super) Observer);

impl std::fmt::Debug for Calls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Calls")
    }
}

impl Intercept for Calls {
    fn name(&self) -> &'static str {
        "calls"
    }

    // Serialising takes the input away, so what it is about is kept from here on.
    fn read_before_serialization(
        &self,
        context: &BeforeSerializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let input = context.input();
        let (operation, key, pairs) = if let Some(input) = input.downcast_ref::<DecryptInput>() {
            (Operation::Decrypt, input.key_id(), input.encryption_context())
        } else if let Some(input) = input.downcast_ref::<GenerateDataKeyInput>() {
            (Operation::GenerateDataKey, input.key_id(), input.encryption_context())
        } else if let Some(input) = input.downcast_ref::<ReEncryptInput>() {
            // The customer whose key it leaves sees it as well.
            let pairs = input.destination_encryption_context();
            (Operation::ReEncrypt, input.destination_key_id(), pairs)
        } else if let Some(input) = input.downcast_ref::<DescribeKeyInput>() {
            (Operation::DescribeKey, input.key_id(), None)
        } else {
            return Ok(());
        };
        if let Some(key) = key.and_then(|key| key.parse().ok()) {
            let context = pairs.map(in_order);
            config.interceptor_state().store_put(About { operation, key, context });
        }
        Ok(())
    }

    // Whoever asked may not wait for the answer, and the customer's CloudTrail has the request.
    fn read_before_transmit(
        &self,
        _context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        if let Some(about) = config.load::<About>().cloned() {
            let (observer, told) = (Arc::clone(&self.0), AtomicBool::new(false));
            config.interceptor_state().store_put(UnderWay { observer, about, told });
        }
        Ok(())
    }

    // It looks at headers and errors, never at the output: that holds the plaintext.
    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let Some(About { operation, key, context: pairs }) = config.load::<About>().cloned() else {
            return Ok(());
        };
        let request_id = context.response().and_then(|response| {
            let headers = response.headers();
            headers.get("x-amzn-requestid").or_else(|| headers.get("x-amz-request-id"))
        });
        let error = match context.output_or_error() {
            Some(Err(error)) => Some(code(error).unwrap_or_else(|| "NoAnswer".to_owned())),
            Some(Ok(_)) | None => None,
        };
        let request_id = request_id.map(str::to_owned);
        if let Some(under_way) = config.load::<UnderWay>() {
            under_way.told.store(true, Ordering::Relaxed);
        }
        (self.0)(Call { operation, key, context: pairs, request_id, error });
        Ok(())
    }
}

/// What an operation is about.
#[derive(Clone, Debug)]
struct About {
    operation: Operation,
    key: KeyArn,
    context: Option<EncryptionContext>,
}

impl Storable for About {
    type Storer = StoreReplace<Self>;
}

/// A request whose answer is waited for. Dropped before, nobody waits any more.
struct UnderWay {
    observer: Observer,
    about: About,
    told: AtomicBool,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !*self.told.get_mut() {
            let About { operation, key, context } = self.about.clone();
            let error = Some("NoAnswer".to_owned());
            (self.observer)(Call { operation, key, context, request_id: None, error });
        }
    }
}

impl std::fmt::Debug for UnderWay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("UnderWay").field(&self.about).finish()
    }
}

impl Storable for UnderWay {
    type Storer = StoreReplace<Self>;
}

fn in_order(pairs: &HashMap<String, String>) -> EncryptionContext {
    EncryptionContext::from_map(
        pairs.iter().map(|(k, v)| (k.clone(), v.clone())).collect::<BTreeMap<_, _>>(),
    )
}

/// The exception's name, if KMS answered with one.
fn code(
    error: &aws_smithy_runtime_api::client::orchestrator::OrchestratorError<
        aws_smithy_runtime_api::client::interceptors::context::Error,
    >,
) -> Option<String> {
    let error = error.as_operation_error()?;
    let code = if let Some(error) = error.downcast_ref::<DecryptError>() {
        error.code()
    } else if let Some(error) = error.downcast_ref::<GenerateDataKeyError>() {
        error.code()
    } else if let Some(error) = error.downcast_ref::<ReEncryptError>() {
        error.code()
    } else {
        error.downcast_ref::<DescribeKeyError>().and_then(ProvideErrorMetadata::code)
    };
    code.map(str::to_owned)
}
