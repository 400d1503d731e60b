//! `secretier migrate plan`.

use std::process::ExitCode;

use clap::Args;

use super::{ConfigFile, Failure, Tenants, open, progress::Progress, run::problem};
use crate::{
    clock::Clock,
    config::Config,
    migration::{
        folders::Strategy,
        origin::ProblemKind,
        plan::{Action, Cost, Plan as Planned, PlanError},
        run::{Options, Verify},
        selection::Selection,
        transfer::{Takes, Transfer},
    },
    phase::Phase,
    tiers::upstream::{self, Settings},
};

#[derive(Debug, Args)]
pub(super) struct Plan {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    /// How folders are read for the plan, and would be by the run
    #[arg(long, value_enum, default_value_t = Strategy::Recursive)]
    strategy: Strategy,
    /// Problems that the run would be told to accept
    #[arg(long, value_name = "PROBLEM", value_delimiter = ',', value_parser = problem)]
    accept: Vec<ProblemKind>,
    /// Print the plan as JSON
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self.tenants.selection_or_all()?;
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let (transfer, _) = open(&config, &clock, self.strategy).await?;
        let accept = self.accept.iter().copied().collect();
        let options = Options { to: Some(Phase::Database), verify: Verify::Full, batch: 25, accept, origin: None };
        show(&transfer, &selection, &options, &cost(&config), self.json).await
    }
}

/// What so many tenants cost, read in such a way.
pub(super) fn cost(config: &Config) -> impl Fn(usize, Strategy) -> Cost + Sync + use<> {
    let upstream = config.upstream().map(upstream::Config::settings);
    let per_minute = upstream.and_then(Settings::migration_requests_per_minute);
    move |tenants, strategy| Cost::of(tenants, strategy, per_minute)
}

/// Makes a plan and prints it.
pub(super) async fn show(
    transfer: &Transfer,
    selection: &Selection,
    options: &Options,
    cost: &(dyn Fn(usize, Strategy) -> Cost + Sync),
    json: bool,
) -> Result<ExitCode, Failure> {
    let mut shown: Option<Progress> = None;
    let plan = transfer
        .plan(selection, options, cost, &mut |done, total| {
            shown.get_or_insert_with(|| Progress::new("tenants", total)).at(done);
        })
        .await;
    if let Some(shown) = shown {
        shown.finish();
    }
    let plan = plan?;
    if json {
        let text = serde_json::to_string(&plan).map_err(|error| Failure::failed("the plan cannot be shown", error))?;
        println!("{text}");
    } else {
        print(&plan);
    }
    // The same exit code as the run's.
    let left_out = matches!(transfer.takes, Takes::Rows { .. }) && !plan.unusable.is_empty();
    let refused = left_out || plan.tenants.iter().any(|one| one.action == Action::Refuse);
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(plan: &Planned) {
    let rows: Vec<Vec<String>> = plan
        .tenants
        .iter()
        .map(|one| {
            let count = |count: Option<usize>| count.map_or_else(|| "-".to_owned(), |count| count.to_string());
            let change = format!("+{} ~{} -{}", one.add, one.change, one.remove);
            vec![
                one.tenant.as_str().to_owned(),
                one.phase.as_str().to_owned(),
                count(one.origin),
                one.database.to_string(),
                if one.origin.is_some() { change } else { "-".to_owned() },
                one.action.as_str().to_owned(),
            ]
        })
        .collect();
    super::super::print_table(&["TENANT", "PHASE", "ORIGIN", "DATABASE", "CHANGE", "ACTION"], &rows);
    for one in &plan.tenants {
        for problem in &one.problems {
            println!("{}: {problem}", one.tenant);
        }
    }
    for name in &plan.unusable {
        println!("{name:?} cannot be a tenant's name: 1 to 63 lower-case letters, digits, '-' or '_'");
    }
    for note in &plan.notes {
        eprintln!("{note}");
    }
    let of = |action| plan.tenants.iter().filter(|one| one.action == action).count();
    let already = of(Action::Already);
    let are = if already == 1 { "is" } else { "are" };
    let Cost { calls, calls_per_minute, minutes, strategy } = plan.cost;
    println!();
    println!(
        "{} would be migrated, {} would not, {already} {are} there already",
        super::super::count(of(Action::Migrate), "tenant"),
        of(Action::Refuse),
    );
    if let Some(strategy) = strategy {
        let strategy = strategy.as_str();
        match calls_per_minute {
            Some(per_minute) => println!(
                "about {calls} calls to upstream with --strategy {strategy}, {minutes} minutes at {per_minute} calls a minute"
            ),
            None => println!("about {calls} reads of folders with --strategy {strategy}"),
        }
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Unknown(_) => Self::usage(error.to_string()),
            PlanError::List(_) | PlanError::Store(_) => Self::failed("there is no plan", error),
        }
    }
}
