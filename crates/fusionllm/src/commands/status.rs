//! `fusionllm status`

use anyhow::bail;
use fusionllm_protocol::{ClientRequest, ToClient};

use crate::cli;
use crate::client::{Client, addressed};
use crate::render;

pub(super) async fn run(args: cli::Status) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.broker).await?;
    let answer = client.request(&ClientRequest::Status).await?;
    client.close().await;
    match answer {
        ToClient::Status(report) if args.json => render::json(&report, true),
        ToClient::Status(report) => render::line(&addressed(&render::status(&report), &args.broker.typed())),
        other => bail!("the broker answered something else: {other:?}"),
    }
}
